"""One pass of a language model over windows of text, stopped at a hook point: rows of activations come out.

Plain transformers code, truncated at the hook's block and left there by an exception; documents are cut into windows
of their own (no document sees another) and batched by length.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from saeutils.kernels import jobs, memory
from saeutils.lm import models, parts
from saeutils.lm.tokens import bos_of

PROBE = torch.randint(0, 200, (2, 12), generator=torch.Generator().manual_seed(0))  # ids on which a hook point is checked
HOOKS = ("hook_resid_post", "hook_mlp_out")


def shard_tokens() -> int:
    """Tokens that fill one shard: 65,536, fewer in a rehearsal (``$SAEUTILS_CAP``)."""
    return jobs.caps().get("shard_tokens", 65_536)


class _Reached(Exception):
    """Raised inside the hook: everything after it would be wasted."""


@dataclass(frozen=True)
class Windows:
    """A tokenised corpus: ``tokens[i]`` is one window (BOS included), cut from document ``doc[i]`` at ``start[i]``."""

    tokens: list[list[int]]
    doc: list[int]
    start: list[int]


def parse_hook(hook: str) -> tuple[int, str]:
    """``blocks.9.hook_resid_post`` → (9, "hook_resid_post"). Raises ValueError with the valid names."""
    match = re.fullmatch(r"blocks\.(\d+)\.(\w+)", hook)
    if not match or match[2] not in HOOKS:
        raise ValueError(f"unknown hook {hook!r}: give blocks.L.NAME with NAME one of {HOOKS}")
    return int(match[1]), match[2]


def hooked_module(model: torch.nn.Module, hook: str) -> torch.nn.Module:
    """The transformers module whose output is the TransformerLens hook point: a block, or its MLP, or the norm behind that.

    Raises:
        ValueError: no such block, or a block without an MLP under one of its usual names.
    """
    layer, kind = parse_hook(hook)
    n = model.config.get_text_config().num_hidden_layers
    lists = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n}
    lists = {name: m for name, m in lists.items() if not re.search("vision|audio", name)}
    if not lists:
        raise ValueError(f"{type(model).__name__}: no list of its {n} blocks is known")
    blocks = lists[min(lists, key=len)]  # the outermost
    if layer >= len(blocks):
        raise ValueError(f"hook {hook!r}: the model has blocks 0…{len(blocks) - 1}")
    block = blocks[layer]
    if kind == "hook_resid_post":
        return block
    for name in ("post_feedforward_layernorm", "post_mlp_layernorm", "mlp"):
        if hasattr(block, name):
            return getattr(block, name)
    raise ValueError(f"{type(block).__name__} has no MLP under a known name: collect blocks.{layer}.hook_resid_post")


@lru_cache(32)
def _bridged(lm: str, hook: str, load: tuple[tuple[str, object], ...]) -> Tensor:
    """What TransformerLens' hook point holds on :data:`PROBE`, [2, 12, d] float32; once a process and model."""
    bridge = models.load_lm(lm, layers=parse_hook(hook)[0] + 1, **dict(load))
    with torch.inference_mode():
        return bridge.run_with_cache(PROBE.to(bridge.cfg.device), names_filter=[hook])[1][hook].float().cpu()


def windows_of(
    text: Dataset, tokenizer, context: int, seed: int, documents: np.ndarray | None = None
) -> Iterator[tuple[int, int, list[int]]]:
    """(document, start, tokens without BOS) of windows of at most ``context`` tokens with it, documents in random order.

    Documents are tokenised a hundred at a time, as they are asked for; ``documents``: only these, a mask [len(text)].
    """
    order = np.random.default_rng(seed).permutation(len(text))
    order = (order if documents is None else order[documents[order]]).tolist()
    body = context - len(bos_of(tokenizer))
    for at in range(0, len(order), 100):
        chunk = order[at : at + 100]
        texts = text.select(chunk)["text"]
        for doc, ids in zip(chunk, tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]):
            for start in range(0, len(ids), body):
                yield doc, start, ids[start : start + body]


def taken(windows: Iterator[tuple[int, int, list[int]]], tokenizer, n_tokens: int | None) -> Windows:
    """The next windows, BOS in front, until they hold ``n_tokens`` (the last is cut), or all."""
    bos = bos_of(tokenizer)
    out, left = Windows([], [], []), n_tokens
    while (left is None or left > 0) and (window := next(windows, None)):
        doc, start, piece = window
        piece = piece[:left]
        out.tokens.append(bos + piece)
        out.doc.append(doc)
        out.start.append(start)
        left = None if left is None else left - len(piece)
    return out


def tokenize(text: Dataset, tokenizer, context: int, n_tokens: int | None, seed: int) -> Windows:
    """Windows of at most ``context`` tokens from documents in random order, until they hold ``n_tokens``.

    Raises:
        ValueError: the text is too short for ``n_tokens``.
    """
    out = taken(windows_of(text, tokenizer, context, seed), tokenizer, n_tokens)
    total = sum(map(len, out.tokens)) - len(out.tokens) * len(bos_of(tokenizer))
    if n_tokens is not None and total < n_tokens:
        raise ValueError(
            f"the text has only {total:,} tokens, {n_tokens:,} were asked for: ask for fewer or add documents"
        )
    if not total:
        raise ValueError("the text has no tokens")
    return out


def pools(windows: Windows, seed: int) -> list[list[int]]:
    """Window numbers in random order, cut into pools of about :func:`shard_tokens` tokens: one pool fills one shard."""
    pools, size, full = [[]], 0, shard_tokens()
    for i in np.random.default_rng(seed + 1).permutation(len(windows.tokens)).tolist():
        if size >= full:
            pools.append([])
            size = 0
        pools[-1].append(i)
        size += len(windows.tokens[i])
    return pools


def _batches(pool: Iterable[int], windows: Windows, batch_tokens: int) -> Iterator[list[int]]:
    """Windows of similar length together, at most ``batch_tokens`` tokens with padding."""
    batch: list[int] = []
    for i in sorted(pool, key=lambda i: len(windows.tokens[i])):
        if batch and (len(batch) + 1) * len(windows.tokens[i]) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


class Collector:
    """Runs an LM, truncated at the hook's block, and returns activations of pools of windows as flat rows."""

    def __init__(self, lm: str, hook: str, batch_tokens: int = 2048, **load):
        memory.reuse()
        self.model, self.tokenizer = models.load_hf(lm, layers=parse_hook(hook)[0] + 1, **load)
        self.hook, self.batch_tokens = hook, batch_tokens
        self.module = hooked_module(self.model, hook)
        known = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        self.special = torch.tensor([i for i in known if i is not None], dtype=torch.long)
        if parse_hook(hook)[1] == "hook_mlp_out":
            self._require_mlp_out(lm, load)

    @torch.inference_mode()
    def forward(self, ids: Tensor) -> Tensor:
        """ids [batch, position], padded on the right → activations [batch, position, d].

        No attention mask: in a causal LM no token sees the padding behind it.
        """
        reached: list[Tensor] = []

        def stop(_module, _inputs, output):
            reached.append(output[0] if isinstance(output, tuple) else output)
            raise _Reached

        handle = self.module.register_forward_hook(stop)
        try:
            self.model(ids.to(self.model.device), use_cache=False)
        except _Reached:
            pass
        finally:
            handle.remove()
        return reached[0]

    def _require_mlp_out(self, lm: str, load: dict[str, object]) -> None:
        """The module must give what the hook point holds, all that the MLP adds to the stream.

        Half precision's rounding adds up over blocks (Gemma: .6% in the first, 5% in the fourteenth): what looks wrong in it is
        asked again in float32.

        Raises:
            ValueError: the block adds something else (Granite multiplies it, BLOOM's MLP gives the whole stream).
        """
        theirs = _bridged(lm, self.hook, tuple(sorted(load.items())))
        ours = self.forward(PROBE).float().cpu()
        if float((ours - theirs).norm() / theirs.norm()) <= parts.tolerance(self.model.dtype):
            return
        if self.model.dtype != torch.float32:
            Collector(lm, self.hook, **load | {"dtype": torch.float32, "device": "cpu"})
        else:
            raise ValueError(
                f"{lm}: in a {self.model.config.model_type} block the MLP module's output is not what it adds to the "
                "residual stream, which is what hook_mlp_out means: collect hook_resid_post"
            )

    def _require_positions(self, length: int) -> None:
        if length > (most := parts.positions(self.model)):
            raise ValueError(f"windows of {length:,} tokens; {type(self.model).__name__} has {most:,} positions: take a smaller context")

    def rows(self, pool: Iterable[int], windows: Windows, outlier: float) -> dict[str, Tensor]:
        """Rows of one pool: ``x`` [n, d], ``token``, ``doc``, ``position`` [n] (position within its document).

        BOS is dropped, and so are BOS, end and padding tokens that a text spells out, and every row whose norm exceeds
        ``outlier`` times the pool's median (attention sinks).

        Raises:
            ValueError: windows longer than the model has positions, NaN or inf.
        """
        pool, bos = list(pool), len(bos_of(self.tokenizer))
        self._require_positions(max((len(windows.tokens[i]) for i in pool), default=0))
        parts: dict[str, list[Tensor]] = {"norm": [], "token": [], "doc": [], "position": []}
        x, filled = None, 0
        for batch in _batches(pool, windows, self.batch_tokens):
            length = torch.tensor([len(windows.tokens[i]) for i in batch])
            ids = torch.zeros(len(batch), int(length.max()), dtype=torch.long)
            for row, i in enumerate(batch):
                ids[row, : length[row]] = torch.tensor(windows.tokens[i])
            place = torch.arange(ids.shape[1]).expand_as(ids)
            keep = (place >= bos) & (place < length[:, None]) & ~torch.isin(ids, self.special)  # [batch, position]
            reached = self.forward(ids).cpu().flatten(0, 1)  # [batch · position, d]
            if x is None:  # filled part by part: gathering parts and joining them would copy all rows twice
                x = reached.new_empty(sum(len(windows.tokens[i]) - bos for i in pool), reached.shape[1])
            part = x[filled : filled + int(keep.sum())]
            torch.index_select(reached, 0, keep.flatten().nonzero()[:, 0], out=part)
            filled += len(part)
            parts["norm"].append(part.float().norm(dim=-1))  # here, while the rows are in the cache
            parts["token"].append(ids[keep].int())
            parts["doc"].append(torch.tensor([windows.doc[i] for i in batch])[:, None].expand_as(ids)[keep].int())
            start = torch.tensor([windows.start[i] for i in batch])[:, None]
            parts["position"].append((start + place - bos)[keep].int())
        out = {"x": x[:filled], **{name: torch.cat(tensors) for name, tensors in parts.items()}}
        norms = out.pop("norm")
        if not torch.isfinite(norms).all():
            raise ValueError(
                f"{self.hook} gave NaN or inf in {x.dtype}: use dtype=torch.float32 (float16 overflows on Gemma)"
            )
        fine = norms <= outlier * norms.median()
        return out if fine.all() else {name: tensor[fine] for name, tensor in out.items()}
