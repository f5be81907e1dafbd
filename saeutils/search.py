"""Which rows of a matrix have large products with given vectors? Looked for in bfloat16 within a proven error.

Where a processor multiplies bfloat16 several times as fast as float32 (AVX-512 BF16, AMX), an upper bound of every product
is cheap, and only what may pass is computed in float32: the outcome is that of the dense float32 product.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROWS = 256  # vectors looked at together: their products stay in the processor's cache
UP = 2.0**-7  # more than bfloat16's relative rounding, 2⁻⁹, and its step, 2⁻⁸


@cache
def quick_bfloat16() -> bool:
    """Has this processor instructions for products of bfloat16?"""
    info = Path("/proc/cpuinfo")
    return info.exists() and not {"avx512_bf16", "amx_bf16"}.isdisjoint(info.read_text().split())


def dots(x: Tensor, W: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """x_row · W_column for every pair, [entries], float32 where x [batch, d] and W [n, d] are; nothing is copied."""
    # the kernel behind the gradient of embedding_bag's weights: thirteen times as fast as a gather and a product
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(x, W, column, row.new_zeros(1), row, 0)


def passing(x: Tensor, W: Tensor, bias: Tensor, k: int | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pairs (i, j) with x_i·W_j + bias_j > 0, of each row only its ``k`` largest where k is given, row by row.

    x [batch, d], W [n, d], bias [n]. Yields (row, column, value) [entries] for a block of rows at a time.
    """
    if not x.is_cuda and x.dtype == torch.float32 and quick_bfloat16() and W.is_contiguous():
        blocks = _bounded(x, W, bias, k)
    else:
        blocks = _dense(x, W, bias, k)
    yield from blocks


def _dense(x: Tensor, W: Tensor, bias: Tensor, k: int | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    rows = len(x) if x.is_cuda else ROWS
    buffer = x.new_empty(min(rows, len(x)), len(W))
    for at in range(0, len(x), rows):
        part = x[at : at + rows]
        pre = torch.addmm(bias, part, W.T, out=buffer[: len(part)])  # [rows, n]
        if k is None:
            i, j = (pre > 0).nonzero(as_tuple=True)
            value = pre[i, j]
        else:
            value, j = (t.flatten() for t in pre.topk(k, dim=1, sorted=False))
            i = torch.arange(len(part), device=x.device).repeat_interleave(k)[value > 0]
            value, j = value[value > 0], j[value > 0]
        yield at + i, j, value


def _bounded(x: Tensor, W: Tensor, bias: Tensor, k: int | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """With x̂, ŵ rounded to bfloat16, x·w ≤ x̂·ŵ + ‖x‖·E, E = max‖x − x̂‖/‖x‖·‖ŵ‖ + ‖w − ŵ‖ + γ‖w‖ (γ: sums in float32).

    Bias and ‖x‖·E ride along as two more columns, so one product gives the bound of every pair. The k-th largest value of a
    row is at least the k-th largest bound less twice the largest error: what is bounded below that cannot be among them.
    """
    low, norms = x.bfloat16(), x.norm(dim=1)  # [batch]
    lost = float(((x - low.float()).norm(dim=1) / norms.clamp_min(1e-30)).max())
    sums = x.shape[1] * 2.0**-22
    Wl = torch.empty(len(W), W.shape[1] + 2, dtype=torch.bfloat16)
    error = torch.empty(len(W))
    for at in range(0, len(W), ROWS):
        w = W[at : at + ROWS]
        Wl[at : at + ROWS, :-2] = w
        rounded = Wl[at : at + ROWS, :-2].float()
        error[at : at + ROWS] = (w - rounded).norm(dim=1) + lost * rounded.norm(dim=1) + sums * w.norm(dim=1)
    Wl[:, -2], Wl[:, -1] = _up(bias), _up(error)
    low = torch.cat([low, torch.ones_like(low[:, :1]), _up(norms)[:, None]], dim=1)  # [batch, d + 2]
    slack = 2 * (norms * float(Wl[:, -1].max()) + float((Wl[:, -2].float() - bias).max()))  # [batch]
    buffer = torch.empty(min(ROWS, len(x)), len(W), dtype=torch.bfloat16)
    for at in range(0, len(x), ROWS):
        part = low[at : at + ROWS]
        # positive bfloat16 are in order as integers, which numpy partitions and compares many at a time
        bound = torch.mm(part, Wl.T, out=buffer[: len(part)]).view(torch.int16).numpy()
        floor = 0 if k is None else _floor(bound, k, slack[at : at + ROWS])
        i, j = (torch.from_numpy(n) for n in np.divmod(np.flatnonzero(bound > floor), len(W)))
        value = dots(x, W, i.add_(at), j) + bias[j]
        yield _largest(i, j, value, k)


def _up(t: Tensor) -> Tensor:
    """bfloat16, not below ``t``."""
    return (t + t.abs() * UP).bfloat16()


def _floor(bound: np.ndarray, k: int, slack: Tensor) -> np.ndarray:
    """What bounds must exceed to be candidates for the k largest of their row, as integers, [rows, 1]."""
    n = bound.shape[1]
    kth = np.partition(bound, n - k, axis=1)[:, n - k]
    lowest = torch.from_numpy(kth.clip(0)).view(torch.bfloat16).float() * (1 - UP) - slack
    return (lowest * (1 - UP)).clamp_min(0).bfloat16().view(torch.int16).numpy()[:, None]


def _largest(i: Tensor, j: Tensor, value: Tensor, k: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Positive entries, of each row at most the k largest; rows in order."""
    if k is not None and len(i):
        first = torch.searchsorted(i, i)  # of each entry's row
        place, inverse = torch.arange(len(i)) - first, i - i[0]
        table = value.new_full((int(inverse[-1]) + 1, max(k, int(place.max()) + 1)), -torch.inf)
        table[inverse, place] = value
        kept = torch.zeros_like(table, dtype=torch.bool).scatter_(1, table.topk(k, dim=1, sorted=False).indices, True)
        chosen = kept[inverse, place] & (value > 0)
    else:
        chosen = value > 0
    return i[chosen], j[chosen], value[chosen]
