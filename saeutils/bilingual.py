"""A small language model of two languages, trained here, with checkpoints: Llama-shaped, so any tool loads it like its elders.

Its two halves of text are no translations of each other: sentence pairs are split so that no pair is seen from both sides.
"""

import copy
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import save_file
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from saeutils import models

BOS = "<s>"


def split_pairs(pairs: Dataset, held_out: int, seed: int = 0) -> tuple[dict[str, list[str]], Dataset]:
    """Sentence pairs (columns ``ja``, ``en``) → training texts by language, and held-out pairs.

    Pairs that share a sentence in either language stay together, so nothing held out is trained on and no training text
    has its translation on the other side.

    Raises:
        ValueError: fewer than three pairs for each one held out.
    """
    if len(pairs) < 3 * held_out:
        raise ValueError(f"{len(pairs)} pairs are too few to hold out {held_out}: give more pairs")
    ja, en = list(pairs["ja"]), list(pairs["en"])
    _, left = np.unique(ja, return_inverse=True)
    _, right = np.unique(en, return_inverse=True)
    n = left.max() + 1
    graph = coo_array((np.ones(len(ja)), (left, n + right)), shape=(n + right.max() + 1,) * 2)
    group = connected_components(graph, directed=False)[1][left]  # [pairs]
    u = np.random.default_rng(seed).random(group.max() + 1)[group]
    share = held_out / len(ja)
    halves = {
        "ja": [t for t, v in zip(ja, u) if share < v <= (1 + share) / 2],
        "en": [t for t, v in zip(en, u) if v > (1 + share) / 2],
    }
    apart = {language: list(dict.fromkeys(texts)) for language, texts in halves.items()}
    return apart, pairs.select(np.flatnonzero(u <= share))


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A BPE of characters with bytes as the last resort; digits stand alone. BOS is the only special token, and pads too."""
    tokenizer = Tokenizer(BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Digits(True), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    special = [BOS, *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, limit_alphabet=vocabulary // 2, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fixed = json.loads(tokenizer.to_str())
    fixed["added_tokens"] = [t for t in fixed["added_tokens"] if t["content"] == BOS]  # bytes are ordinary entries
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(fixed)), bos_token=BOS, eos_token=BOS, pad_token=BOS
    )


def first_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, n: int) -> list[str]:
    """Each text cut after its first ``n`` tokens."""
    encoded = tokenizer(
        list(texts), add_special_tokens=False, truncation=True, max_length=n, return_offsets_mapping=True
    )
    return [t[: max((end for _, end in spans), default=0)] for t, spans in zip(texts, encoded["offset_mapping"])]


def packed(encoded: Sequence[Sequence[int]], bos: int, context: int, seed: int) -> Tensor:
    """Token ids of all texts in a random order, BOS before each, cut into rows [n, context]."""
    order = np.random.default_rng(seed).permutation(len(encoded))
    flat = np.concatenate([[bos, *encoded[i]] for i in order])
    return torch.from_numpy(flat[: len(flat) // context * context].reshape(-1, context)).long()


def train_lm(
    folder: Path, texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, *, width: int, layers: int, heads: int,
    context: int, batch: int, steps: Sequence[int], lr: float, seed: int = 0, device: str | None = None,
) -> dict[int, dict[str, str]]:  # fmt: skip
    """Train from random weights and keep ``step-N`` for every N of ``steps``, in transformers' format and bf16.

    AdamW (.9, .95, weight decay .1), a warm-up over a fiftieth of the run, cosine to a tenth. A run that was killed goes on
    at its last kept step. Give N = 0 to keep the random weights.

    Returns:
        :func:`saeutils.models.checkpoints` of ``folder``.

    Raises:
        ValueError: the texts fill less than one batch.
    """
    device = device or models.default_device()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=8 * width // 3 // 16 * 16, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=4 * context, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    last, done, epoch = max(steps), 0, -1
    running = folder / "running.pt"
    folder.mkdir(parents=True, exist_ok=True)
    if running.exists():
        state = torch.load(running, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    elif 0 in steps:
        _keep(model, tokenizer, folder / "step-0000000")
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    per_epoch = sum(len(ids) + 1 for ids in encoded) // context // batch
    if not per_epoch:
        raise ValueError(f"the texts fill less than one batch of {batch} × {context} tokens: give more text")
    bar = tqdm(range(done, last), initial=done, total=last, desc="training the LM", unit=" steps")
    for step in bar:
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            rows = packed(encoded, tokenizer.bos_token_id, context, seed + epoch)
        ids = rows[step % per_epoch * batch :][:batch].to(device)  # [batch, context]
        share = min(1, (step + 1) / max(1, last // 50)) * (0.55 + 0.45 * math.cos(math.pi * step / last))
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        with torch.autocast(device.split(":")[0], torch.bfloat16, models.default_dtype(device) == torch.bfloat16):
            logits = model(ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
        if step + 1 in steps:
            _keep(model, tokenizer, folder / f"step-{step + 1:07d}")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, folder / "running.tmp")
            os.replace(folder / "running.tmp", running)
    return models.checkpoints(str(folder))


def _keep(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tmp = folder.with_name(f".{folder.name}")
    shutil.rmtree(tmp, ignore_errors=True)
    state = {k: v.detach().to("cpu", torch.bfloat16) for k, v in model.state_dict().items() if k != "lm_head.weight"}
    tmp.mkdir(parents=True)
    save_file(state, tmp / "model.safetensors", {"format": "pt"})
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], "bfloat16"
    config.save_pretrained(tmp)
    tokenizer.save_pretrained(tmp)
    os.replace(tmp, folder)
