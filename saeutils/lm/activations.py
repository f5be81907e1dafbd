"""Activations of one hook point over a corpus: collected once, cached on disk, read as shuffled batches."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor

from saeutils.kernels import files
from saeutils.kernels.door import door, optionally
from saeutils.lm import batches, corpus, shards

SPLITS = ("train", "validation", "test")
FRACTIONS = (0.8, 0.1, 0.1)


def collect(
    lm: str,
    hook: str,
    text: Dataset,
    *,
    n_tokens: int | None = None,
    context: int = 128,
    outlier: float = 10.0,
    seed: int = 0,
    batch_tokens: int = 2048,
    workers: int = 1,
    **load,
) -> "Activations":
    """Activations at ``hook`` over ``text``, from the cache where all inputs are the same.

    The LM is loaded only for shards that are missing or damaged, so an interrupted run goes on where it stopped. Processes
    that collect the same at once share the work, also those of other machines whose cache is the same folder.

    Args:
        lm: model name, as :func:`saeutils.lm.models.load_hf` takes it; ``load`` (``dtype``, ``device``, ``revision``) too.
        hook: ``blocks.L.hook_resid_post`` or ``blocks.L.hook_mlp_out``.
        text: rows with a column ``text``; one row is one document.
        n_tokens: how many tokens to run (BOS not counted; outliers are dropped afterwards); None: all.
        context: window length in tokens, BOS included.
        outlier: drop rows with a norm above this many medians.
        workers: processes side by side, each with its GPU or its share of the cores, and with the LM in its memory; the rows
            are the same.

    Raises:
        ValueError: unknown hook or layer, too little text, non-finite activations; what :mod:`saeutils.lm.corpus` refuses.
    """
    door(hook=hook, seed=seed, context=context, batch_tokens=batch_tokens, outlier=outlier, workers=workers)
    optionally(n_tokens=n_tokens)
    n_tokens = n_tokens and int(n_tokens)
    settings = dict(n_tokens=n_tokens, context=int(context), outlier=float(outlier), seed=int(seed), batch_tokens=int(batch_tokens))
    corpus.require(lm, text)
    folder = files.cache_dir("activations", corpus.key(lm, hook, text, load, **settings))
    acts = Activations(folder)
    damaged = acts.damaged()  # hashes every shard: once
    if damaged:  # before anybody makes them again
        whole = {name: shard for name, shard in acts.meta["shards"].items() if name not in damaged}
        shards.write_meta(folder, {**acts.meta, "shards": whole, "complete": False})
    if not acts.meta.get("complete") or damaged:
        shards.fill(folder, lm, hook, text, settings, load, int(workers))
    return Activations(folder)


def split_of(doc: Tensor, fractions: tuple[float, float, float] = FRACTIONS) -> Tensor:
    """Document numbers → 0 train, 1 validation, 2 test."""
    u = ((doc.long() * 2_654_435_761) % 2**32).double() / 2**32  # Knuth's multiplicative hash
    return torch.bucketize(u, torch.tensor(fractions, dtype=torch.double).cumsum(0)[:2], right=True)


class Activations:
    """Collected rows in a folder of shards; memory-mapped, so only what is touched is read.

    Documents are assigned to train, validation and test by a hash of their number, so no document is in two of them.
    """

    def __init__(self, folder: str | Path, fractions: tuple[float, float, float] = FRACTIONS):
        door(folder=folder, fractions=fractions)
        self.folder, self.fractions = Path(folder), fractions
        self.meta = files.read_json(self.folder / "meta.json")
        self.d: int = self.meta.get("d", 0)
        self._scales: dict[tuple[bool, str], float] = {}

    def damaged(self) -> set[str]:
        """Names of recorded shards that are missing or do not have their recorded SHA-256."""
        shards = self.meta.get("shards", {})
        path = self.folder.joinpath
        return {n for n, s in shards.items() if not path(n).exists() or files.sha256_of(path(n)) != s["sha256"]}

    def _load(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / name)  # safetensors maps the file, it does not read it

    def split_of(self, doc: Tensor) -> Tensor:
        """Document numbers → 0 train, 1 validation, 2 test."""
        return split_of(doc, self.fractions)

    @cached_property
    def _rows(self) -> dict[str, list[Tensor]]:
        """Split → for every shard, the numbers of its rows."""
        assigned = [self.split_of(self._load(name)["doc"]) for name in self.meta["shards"]]
        return {s: [(a == i).nonzero()[:, 0] for a in assigned] for i, s in enumerate(SPLITS)}

    def count(self, split: str = "train") -> int:
        """Number of rows in a split.

        Raises:
            ValueError: no such split; a folder without activations.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split={split!r}: one of {SPLITS}")
        if not self.meta.get("shards"):
            raise ValueError(f"no activations in {self.folder}: collect writes them, and gives back what reads them")
        return sum(map(len, self._rows[split]))

    def sample(self, n: int, split: str = "validation", seed: int = 0) -> dict[str, Tensor]:
        """At most ``n`` random rows: ``x`` [n, d] float32, ``token``, ``doc``, ``position`` [n]."""
        if not self.count(split):
            raise ValueError(f"the {split} split is empty: collect more documents or change fractions={self.fractions}")
        sizes = [len(r) for r in self._rows[split]]
        picked = np.random.default_rng(seed).permutation(sum(sizes))[:n]
        edges = np.cumsum([0, *sizes])
        parts = []
        for i, name in enumerate(self.meta["shards"]):
            inside = picked[(picked >= edges[i]) & (picked < edges[i + 1])] - edges[i]
            if len(inside):
                rows = self._rows[split][i][torch.from_numpy(inside)]
                parts.append({k: v[rows] for k, v in self._load(name).items()})
        out = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
        return {**out, "x": out["x"].float()}

    def all(self) -> dict[str, Tensor]:
        """Every row of a small set, sorted by document and position: ``x`` float32, ``token``, ``doc``, ``position``."""
        shards = [self._load(name) for name in self.meta["shards"]]
        out = {k: torch.cat([s[k] for s in shards]) for k in shards[0]}
        order = (out["doc"].long() * (1 << 32) + out["position"]).argsort()
        return {k: (v.float() if k == "x" else v)[order] for k, v in out.items()}

    @cached_property
    def mean(self) -> Tensor:
        """Mean of (a sample of) the train rows, [d]."""
        return self.sample(50_000, "train")["x"].mean(0)

    def scale(self, centre: bool = True, normalise: str = "scale") -> float:
        """The factor by which ``batches`` multiplies train rows, centred or not: see its ``normalise``."""
        if not batches.one_factor(normalise):
            return 1.0
        if (asked := (centre, normalise)) not in self._scales:
            x = self.sample(50_000, "train")["x"]
            self._scales[asked] = batches.factor(x.sub_(self.mean) if centre else x, normalise)
        return self._scales[asked]

    def batches(
        self,
        batch_size: int = 4096,
        *,
        split: str = "train",
        seed: int = 0,
        start: int = 0,
        normalise: str = "none",
        centre: bool = False,
        group: int = 16,
    ) -> batches.Batches:
        """Endless shuffled batches [batch_size, d], float32, deterministic in ``seed``; ``start`` skips so many cheaply.

        Args:
            normalise: ``none``; ``l2`` (every row to norm 1); one factor for all rows: ``scale`` (mean norm √d) or ``rms``
                (root mean squared norm 1), see :meth:`scale`.
            centre: subtract :attr:`mean` first.
            group: this many shards are shuffled together (memory: one group).
        """
        if self.count(split) < batch_size:
            raise ValueError(f"{split} has {self.count(split):,} rows, fewer than one batch of {batch_size:,}")
        shift = self.mean if centre else torch.zeros(self.d)
        factor = self.scale(centre, normalise)
        origin = {"lm": self.meta["lm"], "hook": self.meta["hook"], "normalise": normalise, "factor": factor, "centred": centre}
        rows = self._shuffled(batch_size, split, seed, start, group)
        # map holds no batch while the next group is read, which would keep the whole last group in memory
        return batches.Batches(map(lambda x: batches.normalised(x, shift, factor, normalise), rows), origin)

    def _shuffled(self, size: int, split: str, seed: int, start: int, group: int) -> Iterator[Tensor]:
        rng = np.random.default_rng(seed)
        names, left, skip = list(self.meta["shards"]), torch.empty(0, self.d), start * size
        while True:
            order = rng.permutation(len(names))
            for at in range(0, len(order), group):
                members = order[at : at + group]
                order_in = rng.permutation(sum(len(self._rows[split][i]) for i in members))
                if skip >= len(order_in):  # nothing is left over while skipping
                    skip -= len(order_in)
                    continue
                pool = self._group([(names[i], self._rows[split][i]) for i in members], order_in, left)[skip:]
                skip = 0
                whole = len(pool) // size * size
                for at_row in range(0, whole, size):
                    yield pool[at_row : at_row + size]
                left = pool[whole:].clone()
                del pool  # before the next group is read: one group in memory, not two

    def _group(self, parts: list[tuple[str, Tensor]], order: np.ndarray, left: Tensor) -> Tensor:
        """``left``, then rows of these shards in ``order``: each is written to its place at once, so no second copy is held."""
        place = np.empty_like(order)
        place[order] = np.arange(len(left), len(left) + len(order))
        pool, at = torch.empty(0), 0
        for name, numbers in parts:
            rows = self._load(name)["x"][numbers]
            if not len(pool):
                pool = rows.new_empty(len(left) + len(order), self.d)
                pool[: len(left)] = left
            pool[torch.from_numpy(place[at : at + len(rows)])] = rows
            at += len(rows)
        return pool
