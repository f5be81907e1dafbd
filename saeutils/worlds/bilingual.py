"""A small language model of two languages, trained here, with checkpoints: Llama-shaped, so any tool loads it like its elders.

Its two halves of text are no translations of each other: sentence pairs are split so that no pair is seen from both sides.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from saeutils.analysis import language
from saeutils.kernels import files
from saeutils.kernels.door import door
from saeutils.lm import models, pretraining, text

BOS = "<s>"
HELD_OUT = 4_000  # pairs of Tatoeba that the shipped LM has not seen
LONGEST = 16  # characters that most tokens have at the most


def split_pairs(pairs: Dataset, held_out: int, seed: int = 0) -> tuple[dict[str, list[str]], Dataset]:
    """Sentence pairs (columns ``ja``, ``en``) → training texts by language, and held-out pairs.

    Pairs that share a sentence in either language stay together, so nothing held out is trained on and no training text
    has its translation on the other side.

    Raises:
        ValueError: fewer than three pairs for each one held out.
    """
    u, share = _drawn(pairs, held_out, seed)
    ja, en = pairs["ja"][:], pairs["en"][:]
    halves = {
        "ja": [t for t, v in zip(ja, u) if share < v <= (1 + share) / 2],
        "en": [t for t, v in zip(en, u) if v > (1 + share) / 2],
    }
    apart = {language: list(dict.fromkeys(texts)) for language, texts in halves.items()}
    return apart, pairs.select(np.flatnonzero(u <= share))


def hold_out(pairs: Dataset, held_out: int, seed: int = 0) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Both sides (``ja``, ``en``) of all other sentence pairs, and of those that :func:`split_pairs` holds out: none is in both."""
    u, share = _drawn(pairs, held_out, seed)
    sides = {language: np.array(pairs[language][:], dtype=object) for language in ("ja", "en")}
    rest, apart = ({language: side[chosen].tolist() for language, side in sides.items()} for chosen in (u > share, u <= share))
    return rest, apart


def _drawn(pairs: Dataset, held_out: int, seed: int) -> tuple[np.ndarray, float]:
    """A number in [0, 1) for each pair, the same where pairs share a sentence, and the share below which one is held out."""
    door(held_out=held_out, seed=seed)
    if len(pairs) < 3 * held_out:
        raise ValueError(f"{len(pairs)} pairs are too few to hold out {held_out}: give more pairs")
    left, right = (pd.factorize(np.array(pairs[language][:], dtype=object), sort=True)[0] for language in ("ja", "en"))
    n = left.max() + 1
    graph = coo_array((np.ones(len(pairs)), (left, n + right)), shape=(n + right.max() + 1,) * 2)
    group = connected_components(graph, directed=False)[1][left]  # [pairs]
    return np.random.default_rng(seed).random(group.max() + 1)[group], held_out / len(pairs)


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


def documents(names: Sequence[str], tokenizer: PreTrainedTokenizerFast, n: int, docs: int, skip: int = 0) -> Dataset:
    """Japanese and English documents in turn (or those of one source), each its first ``n`` tokens, in a column ``text``.

    Args:
        names: a Japanese and an English source of :func:`saeutils.lm.text.load_text`; or ``tatoeba`` alone, whose pairs are
            split so that no document has its translation on the other side (what the shipped LM was trained on); or any
            other source alone, in whatever language it is.
        docs, skip: so many, after so many, in the order of the source. Tatoeba's is nearly alphabetical: what is divided by
            place instead of at random differs in its texts.

    Raises:
        ValueError: the sources end before ``skip`` documents, or are not of these languages.
    """
    door(names=names, docs=docs, skip=skip)
    if list(names) == ["tatoeba"]:
        sides = list(split_pairs(text.load_text("tatoeba"), HELD_OUT)[0].values())
    else:
        sides = [text.load_text(name, max_docs=-(-(skip + docs) // len(names)))["text"] for name in names]
    for side, expected in zip(sides, ("ja", "en")):
        if len(sides) > 1:
            language.require(side, expected)
    both = [t for pair in zip(*sides) for t in pair]
    if len(both) <= skip:
        raise ValueError(f"{', '.join(names)}: {len(both):,} documents, none after the first {skip:,}: ask for fewer")
    return Dataset.from_dict({"text": first_tokens(both[skip : skip + docs], tokenizer, n)})


def first_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, n: int) -> list[str]:
    """Each text cut after its first ``n`` tokens.

    Only the beginnings of long texts are tokenised, a thousand texts at a time: whole articles would take 138 bytes of
    memory for each of their tokens.
    """
    door(n=n)
    texts = list(texts)
    return [t for at in range(0, len(texts), 1000) for t in _cut(texts[at : at + 1000], tokenizer, n, LONGEST * n)]


def _cut(texts: list[str], tokenizer: PreTrainedTokenizerFast, n: int, characters: int) -> list[str]:
    heads = [t[:characters] for t in texts]
    encoded = tokenizer(heads, add_special_tokens=False, truncation=True, max_length=n, return_offsets_mapping=True)
    cut = [t[: max((end for _, end in spans), default=0)] for t, spans in zip(heads, encoded["offset_mapping"])]
    short = [i for i, spans in enumerate(encoded["offset_mapping"]) if len(spans) < n and len(texts[i]) > characters]
    if short:
        for i, longer in zip(short, _cut([texts[i] for i in short], tokenizer, n, 8 * characters)):
            cut[i] = longer
    return cut


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
        :func:`saeutils.lm.models.checkpoints` of ``folder``.

    Raises:
        ValueError: the texts fill less than one batch.
    """
    door(folder=folder, texts=texts, tokenizer=tokenizer, width=width, layers=layers, heads=heads, context=context, batch=batch, lr=lr, seed=seed)
    if not isinstance(steps, Sequence) or isinstance(steps, str) or not steps or min(steps) < 0:
        raise ValueError(f"steps={steps!r}: expected a list of the steps to keep, 0 for the random weights")
    folder, width, layers, heads, context = Path(folder), int(width), int(layers), int(heads), int(context)
    with files.lock("tokenizer", str(folder.resolve())), files.whole_folder(folder / "tokenizer") as fresh:
        if fresh:
            tokenizer.save_pretrained(fresh)  # trained again it may differ, as ties in counts are broken by chance
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=8 * width // 3 // 16 * 16, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=4 * context, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=None, pad_token_id=None, attn_implementation="eager",
    )  # fmt: skip  # on a CPU fused attention over short rows takes twice the time, backwards
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(device or models.default_device())

    def batches(at: int) -> Iterator[tuple[Tensor, Tensor]]:
        encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        per_epoch = sum(len(ids) + 1 for ids in encoded) // context // batch
        if not per_epoch:
            raise ValueError(f"the texts fill less than one batch of {batch} × {context} tokens: give more text")
        for epoch in count(at // per_epoch):
            rows = packed(encoded, tokenizer.bos_token_id, context, seed + epoch)
            for n in range(at % per_epoch, per_epoch):
                ids = rows[n * batch :][:batch]  # [batch, context]
                yield ids, torch.ones_like(ids, dtype=torch.bool)
            at = 0  # only the first epoch begins in its middle

    of = {"texts": files.key(*texts), "context": context, "batch": batch, "seed": seed}
    return pretraining.fit(folder, model, tokenizer, batches, steps, lr, of=of)
