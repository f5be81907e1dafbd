"""Which rows of a matrix have large products with given vectors? Looked for in bfloat16 within a proven error.

Where a processor multiplies bfloat16 several times as fast as float32 (AVX-512 BF16, AMX), an upper bound of every product
is cheap, and only what may pass is computed in float32: the outcome is that of the dense float32 product, but for the order
of its sums (1e-7) and for ties.
"""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROWS = 256  # vectors looked at together: their products stay in the processor's cache
GPU_BLOCK = 2**28  # products held at a time on a GPU: 1 GiB
NARROW, SMALL = 256, 2**28  # width and multiplications under which float32 is as quick
UP = 2.0**-7  # bfloat16's step; its rounding is half of that


@cache
def quick_bfloat16() -> bool:
    """Has this processor instructions for products of bfloat16?"""
    info = Path("/proc/cpuinfo")
    return info.exists() and not {"avx512_bf16", "amx_bf16"}.isdisjoint(info.read_text().split())


def dots(x: Tensor, W: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """x_row · W_column for every pair, [entries], float32 where x [batch, d] and W [n, d] are; nothing is copied."""
    # the kernel behind the gradient of embedding_bag's weights: thirteen times as fast as a gather and a product
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(x, W, column, row.new_zeros(1), row, 0)


def passing(
    x: Tensor, W: Tensor, bias: Tensor, *, floor: Tensor | None = None, k: int | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pairs (i, j) with x_i·W_j + bias_j > floor_j, row by row; or the ``k`` largest of each row, where above 0.

    x [batch, d], W [n, d], bias and floor (default 0) [n]. Yields (row, column, value) [entries] for a block of rows at a
    time, value = x_i·W_j + bias_j.
    """
    floor = torch.zeros_like(bias) if floor is None else floor
    yield from (_bounded if _worthwhile(x, W, bias - floor) else _dense)(x, W, bias, floor, k)


def _worthwhile(x: Tensor, W: Tensor, bias: Tensor) -> bool:
    """Does bounding first take less time? Small problems are done before the bounds are built; NaN has none."""
    usual = x.device.type == "cpu" and x.dtype == torch.float32 and W.is_contiguous()
    large = x.shape[1] >= NARROW and len(x) * W.numel() >= SMALL
    return usual and large and quick_bfloat16() and bool(torch.isfinite(x.sum() + W.sum() + bias.sum()))


def _dense(x: Tensor, W: Tensor, bias: Tensor, floor: Tensor, k: int | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    rows = min(len(x), max(1, GPU_BLOCK // len(W))) if x.is_cuda else ROWS
    buffer = x.new_empty(min(rows, len(x)), len(W))
    for at in range(0, len(x), rows):
        part = x[at : at + rows]
        pre = torch.addmm(bias, part, W.T, out=buffer[: len(part)])  # [rows, n]
        if k is None:
            i, j = (pre > floor).nonzero(as_tuple=True)
            value = pre[i, j]
        else:
            value, j = (t.flatten() for t in pre.topk(k, dim=1, sorted=False))
            kept = (value > 0).nonzero()[:, 0]
            i, j, value = kept // k, j[kept], value[kept]
        yield at + i, j, value


def _bounded(
    x: Tensor, W: Tensor, bias: Tensor, floor: Tensor, k: int | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """With x̂, ŵ rounded to bfloat16, x·w ≤ x̂·ŵ + ‖x‖·E, E = λ‖ŵ‖ + ‖w − ŵ‖ + γ‖w‖ (λ = max‖x − x̂‖/‖x‖, γ: sums in float32).

    Bias less floor and ‖x‖·E ride along as two more columns, so one product gives the bound of every pair.
    """
    low, norms = x.bfloat16(), x.norm(dim=1).clamp_min(1e-15)  # [batch]; squares below 1e-38 are lost
    lost = float(((x - low.float()).norm(dim=1) / norms).max())
    Wl = torch.empty(len(W), W.shape[1] + 2, dtype=torch.bfloat16)
    error = torch.empty(len(W))
    for at in range(0, len(W), ROWS):
        w = W[at : at + ROWS]
        Wl[at : at + ROWS, :-2] = w
        off = (w - Wl[at : at + ROWS, :-2]).norm(dim=1)
        # ‖ŵ‖ ≤ ‖w‖ + ‖w − ŵ‖
        error[at : at + ROWS] = (1 + lost) * off + (lost + x.shape[1] * 2.0**-23) * w.norm(dim=1)
    over = bias - floor
    Wl[:, -2], Wl[:, -1] = _up(over), _up(error.clamp_min(1e-18))
    low = torch.cat([low, torch.ones_like(low[:, :1]), _up(norms)[:, None]], dim=1)  # [batch, d + 2]
    slack = 2 * (1 + UP) * (norms * float(Wl[:, -1].max()) + float((Wl[:, -2].float() - over).max()))  # [batch]
    buffer = torch.empty(min(ROWS, len(x)), len(W), dtype=torch.bfloat16)
    for at in range(0, len(x), ROWS):
        part = low[at : at + ROWS]
        # positive bfloat16 are in order as integers, which numpy partitions and compares many at a time
        bound = torch.mm(part, Wl.T, out=buffer[: len(part)]).view(torch.int16).numpy()

        def value(i: Tensor, j: Tensor, at: int = at) -> Tensor:
            return dots(x, W, i + at, j) + bias[j]

        if k is None:
            i, j = _pairs(np.flatnonzero(bound > 0), len(W))
            values = value(i, j)
            above = values > floor[j]
            i, j, values = i[above], j[above], values[above]
        else:
            i, j, values = _largest(bound, k, slack[at : at + ROWS], value)
        yield at + i, j, values


def _largest(bound: np.ndarray, k: int, slack: Tensor, value: Callable) -> tuple[Tensor, Tensor, Tensor]:
    """The ``k`` largest positive values of each row, given upper bounds [rows, n] and what they exceed values by at most.

    First those with the k largest bounds are computed; others only where their bound exceeds the least of these.
    """
    n = bound.shape[1]
    kth = np.partition(bound, n - k, axis=1)[:, n - k].clip(0)
    least = (_float(kth) * (1 - UP) - slack).clamp_min(0) * (1 - UP)  # of the k largest values
    flat = np.flatnonzero(bound > least.bfloat16().view(torch.int16).numpy()[:, None])
    (i, j), bound = _pairs(flat, n), bound.ravel()[flat]
    first = torch.from_numpy(bound >= kth[i.numpy()])
    place = torch.arange(len(i)) - torch.searchsorted(i, i)  # among its row's
    width = max(k, int(place.max()) + 1 if len(i) else 0)
    table = torch.full((len(kth), width), -torch.inf)  # [rows, candidates]
    table[i[first], place[first]] = value(i[first], j[first])
    least = table.topk(k, dim=1, sorted=False).values.amin(1)
    others = ~first & (_float(bound) * (1 + UP) > least[i])
    table[i[others], place[others]] = value(i[others], j[others])
    kept = torch.zeros_like(table, dtype=torch.bool).scatter_(1, table.topk(k, dim=1, sorted=False).indices, True)
    values = table[i, place]
    chosen = kept[i, place] & (values > 0)
    return i[chosen], j[chosen], values[chosen]


def _pairs(flat: np.ndarray, n: int) -> tuple[Tensor, Tensor]:
    i, j = np.divmod(flat, n)
    return torch.from_numpy(i), torch.from_numpy(j)


def _up(t: Tensor) -> Tensor:
    """bfloat16, not below ``t``."""
    return (t + t.abs() * UP).bfloat16()


def _float(bits: np.ndarray) -> Tensor:
    return torch.from_numpy(bits).view(torch.bfloat16).float()
