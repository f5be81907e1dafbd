"""Batches of rows: how they are scaled before an SAE sees them, and what they know of it."""

from collections.abc import Iterator

import torch
from torch import Tensor

KINDS = ("none", "l2", "scale", "rms")


def one_factor(normalise: str) -> bool:
    """Is it one factor for all rows? Raises ValueError for an unknown name."""
    if not isinstance(normalise, str) or normalise not in KINDS:
        raise ValueError(f"unknown normalise={normalise!r}: none, l2, scale or rms")
    return normalise in ("scale", "rms")


def factor(x: Tensor, normalise: str) -> float:
    """What rows [n, d] are multiplied by: ``scale``, mean norm √d; ``rms``, root mean squared norm 1.

    Raises:
        ValueError: all rows are zero.
    """
    norms = x.norm(dim=-1)
    size = float(norms.mean()) if normalise == "scale" else float(norms.pow(2).mean().sqrt())
    if not size > 0:
        raise ValueError(f"{len(x):,} rows of mean norm {size}: nothing to scale (all equal to their mean?)")
    return (x.shape[1] ** 0.5 if normalise == "scale" else 1.0) / size


def normalised(rows: Tensor, shift: Tensor, factor: float, normalise: str) -> Tensor:
    """(rows − shift)·factor in float32, and each at norm 1 for ``l2``; rows [n, d], shift [d]."""
    x = (rows.float() - shift) * factor
    return torch.nn.functional.normalize(x, dim=-1) if normalise == "l2" else x


class Batches:
    """An endless iterator of batches that knows where its rows come from.

    ``origin``: ``lm``, ``hook``, ``normalise``, ``factor``, ``centred``; of a stream known with the first batch.
    """

    def __init__(self, rows: Iterator[Tensor], origin: dict):
        self.rows, self.origin = rows, origin

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        return next(self.rows)
