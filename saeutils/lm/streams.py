"""Rows straight from the LM, for runs larger than disk and memory."""

from collections.abc import Iterator
from itertools import count
from math import inf

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from saeutils.kernels.door import door, optionally
from saeutils.lm import batches, corpus
from saeutils.lm.activations import split_of
from saeutils.lm.collector import Collector, shard_tokens, taken, windows_of

TOP_UP = 256  # tokens read at least: outliers are known by a pool's median


def stream(
    lm: str, hook: str, text: Dataset, *, batch_size: int = 4096, context: int = 128, outlier: float = 10.0,
    normalise: str = "none", centre: bool = False, seed: int = 0, buffer: int = 4, start: int = 0,
    steps: int | None = None, **load,
) -> batches.Batches:  # fmt: skip
    """Shuffled batches [batch_size, d] straight from the LM, for runs larger than disk and memory; endless, or ``steps`` of them.

    A pool of ``buffer`` + 1 shards is filled, half of it is given out, and so on; mean and scale are those of the first
    pool; validation and test documents (as :class:`Activations` assigns them) are not run. ``start`` replays so many batches.
    ``steps``: how many are wanted in all, those included; no row is made that nobody gets. Other arguments as in
    :func:`collect` and :meth:`Activations.batches`.

    Memory, however long the text: one and a half pools and five shards of 65,536 rows in the LM's dtype, so 1.1 GB for
    d = 640 in bfloat16 with the default buffer.

    Raises:
        ValueError: as :func:`collect`; a buffer too small for the batch; an unknown ``normalise``; less text for
            training than the pool holds.
    """
    door(hook=hook, batch_size=batch_size, context=context, outlier=outlier, seed=seed, buffer=buffer, start=start)
    optionally(steps=steps)
    shard = shard_tokens()
    if batch_size > buffer * shard:
        raise ValueError(f"buffer={buffer} shards of {shard:,} rows must hold a batch of {batch_size:,}")
    batches.one_factor(normalise)
    corpus.require(lm, text)
    origin = {"lm": lm, "hook": hook, "normalise": normalise, "factor": 1.0, "centred": centre}
    return batches.Batches(_streamed(text, load, origin, batch_size, context, outlier, seed, buffer, start, steps), origin)


def _streamed(
    text: Dataset, load: dict, origin: dict, batch_size: int, context: int, outlier: float, seed: int, buffer: int, start: int,
    steps: int | None,
) -> Iterator[Tensor]:  # fmt: skip
    """The batches of :func:`stream`; the factor is written into ``origin`` before the first leaves."""
    collector, shard, wanted = Collector(origin["lm"], origin["hook"], **load), shard_tokens(), (steps or inf) * batch_size
    train = (split_of(torch.arange(len(text))) == 0).numpy()  # of others nothing is run
    pool, used, given, shift = torch.empty(0), 0, 0, None
    for epoch in count():
        pieces, filled = windows_of(text, collector.tokenizer, context, seed + epoch, train), 0
        for n in count():
            missing = wanted - given - used
            windows = taken(pieces, collector.tokenizer, int(min(shard, max(TOP_UP, missing))))
            if not windows.tokens:
                break
            x = collector.rows(range(len(windows.tokens)), windows, outlier)["x"][: int(min(missing, shard))]
            if not len(pool):
                pool = x.new_empty(int(min((buffer + 1) * shard, wanted)), x.shape[1])
            pool[used : used + len(x)] = x
            used, filled = used + len(x), filled + len(x)
            del x  # before the next is born
            last = given + used >= wanted
            if used + min(shard, wanted - given - used) <= len(pool) and not last:
                continue
            order = torch.from_numpy(np.random.default_rng([seed, epoch, n]).permutation(used))
            if shift is None:
                shift = _scaled(pool[order[:50_000]].float(), origin)
            room = used if last else max(used // 2, used + shard - len(pool))  # for a shard at least
            out = -(-room // batch_size) * batch_size
            for at in range(0, out, batch_size):
                given += batch_size
                if start:
                    start -= 1
                    continue
                yield batches.normalised(pool[order[at : at + batch_size]], shift, origin["factor"], origin["normalise"])
            if last:
                return
            used -= out
            pool[:used] = pool[order[out:]]
        if not filled:
            raise ValueError("the text has no tokens in documents for training: give more of it")
        if shift is None:
            raise ValueError(
                f"the text has {used:,} rows for training, the stream's pool holds {len(pool):,}: a smaller buffer, or collect, "
                "which keeps them all"
            )


def _scaled(some: Tensor, origin: dict) -> Tensor:
    """What is subtracted from every row, [d]; the factor is written into ``origin``."""
    shift = some.mean(0) if origin["centred"] else torch.zeros(some.shape[1])
    if batches.one_factor(origin["normalise"]):
        origin["factor"] = batches.factor(some - shift, origin["normalise"])
    return shift
