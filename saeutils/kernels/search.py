"""Which rows of a matrix have large products with given vectors? Looked for in bfloat16 within a proven error.

Where a processor multiplies bfloat16 several times as fast as float32 (AVX-512 BF16, AMX), an upper bound of every product
is cheap, and only what may pass is computed in float32: the outcome is that of the dense float32 product, but for the order
of its sums (1e-7) and for ties.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 64  # rows of bfloat16 are filled up to a multiple of this: their product then takes two thirds of the time
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
    row, column = row.contiguous(), column.contiguous()  # which it takes for granted
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

    Bias less floor and ‖x‖·E ride along as two more columns, so one product gives the bound of every pair; zeros fill the
    rest of a tile.
    """
    low, norms = x.bfloat16(), x.norm(dim=1).clamp_min(1e-15)  # [batch]; squares below 1e-38 are lost
    lost = float(((x - low.float()).norm(dim=1) / norms).max())
    d = W.shape[1]
    Wl = torch.zeros(len(W), d + 2 + -(d + 2) % TILE, dtype=torch.bfloat16)
    error = torch.empty(len(W))
    for at in range(0, len(W), ROWS):
        w = W[at : at + ROWS]
        Wl[at : at + ROWS, :d] = w
        off = (w - Wl[at : at + ROWS, :d]).norm(dim=1)
        # ‖ŵ‖ ≤ ‖w‖ + ‖w − ŵ‖
        error[at : at + ROWS] = (1 + lost) * off + (lost + d * 2.0**-23) * w.norm(dim=1)
    over = bias - floor
    Wl[:, d], Wl[:, d + 1] = _up(over), _up(error.clamp_min(1e-18))
    low = F.pad(torch.cat([low, torch.ones_like(low[:, :1]), _up(norms)[:, None]], dim=1), (0, -(d + 2) % TILE))
    slack = 2 * (1 + UP) * (norms * float(Wl[:, d + 1].max()) + float((Wl[:, d].float() - over).max()))  # [batch]
    kept, level = threading.local(), floor.detach().numpy()  # kept by each thread: memory for the bounds

    def block(at: int) -> tuple[Tensor, Tensor, Tensor]:
        part = low[at : at + ROWS]
        if not hasattr(kept, "buffer"):
            kept.buffer = torch.empty(len(part), len(W), dtype=torch.bfloat16)
        # positive bfloat16 are in order as integers, which numpy partitions and compares many at a time
        bound = torch.mm(part, Wl.T, out=kept.buffer[: len(part)]).view(torch.int16).numpy()

        def value(i: np.ndarray, j: np.ndarray) -> np.ndarray:
            i, j = torch.from_numpy(i), torch.from_numpy(j)
            return (dots(x, W, i + at, j) + bias[j]).numpy()

        if k is None:
            i, j = np.divmod(np.flatnonzero(bound > 0), len(W))
            values = value(i, j)
            above = values > level[j]
            found = i[above], j[above], values[above]
        else:
            found = _largest(bound, k, slack[at : at + ROWS], value)
        i, j, values = map(torch.from_numpy, found)
        return at + i, j, values

    yield from _side_by_side(block, range(0, len(x), ROWS))


def _side_by_side(block: Callable[[int], tuple[Tensor, ...]], starts: Sequence[int]) -> Iterator[tuple[Tensor, ...]]:
    """``map``, a thread a block with its share of PyTorch's: numpy works with one, and PyTorch waits for all after each part."""
    threads = torch.get_num_threads()
    # PyTorch's own threads wait actively for a while, in the way of these: not for a short search
    workers = min(threads, len(starts) // 4)
    if workers < 2:
        yield from map(block, starts)
        return
    try:
        yield from _pool(workers, threads // workers).map(torch.no_grad()(block), starts)
    finally:
        torch.set_num_threads(threads)  # of threads yet to come


@cache
def _pool(workers: int, each: int) -> ThreadPoolExecutor:
    """Kept: a thread's first product of bfloat16 takes milliseconds."""
    return ThreadPoolExecutor(workers, "search", torch.set_num_threads, (each,))


def _largest(bound: np.ndarray, k: int, slack: Tensor, value: Callable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ``k`` largest positive values of each row, given upper bounds [rows, n] and what they exceed values by at most.

    First those with the k largest bounds are computed; others only where their bound exceeds the least of these.
    """
    rows, n = bound.shape
    kth = np.partition(bound, n - k, axis=1)[:, n - k].clip(0)
    least = (_float(kth) * (1 - UP) - slack).clamp_min(0) * (1 - UP)  # of the k largest values
    flat = np.flatnonzero(bound > least.bfloat16().view(torch.int16).numpy()[:, None])
    i, j = np.divmod(flat, n)
    bound = bound.ravel()[flat]
    first, values = bound >= kth[i], np.empty(len(i), np.float32)
    at = np.flatnonzero(first)
    values[at] = value(i[at], j[at])
    per_row = np.bincount(i[at], minlength=rows)
    least = np.zeros(rows, np.float32)
    if len(at):
        begin = (per_row.cumsum() - per_row)[per_row > 0]
        least[per_row > 0] = np.minimum.reduceat(values[at], begin)
    least[per_row < k] = 0  # all that are positive pass
    other = ~first & (_float(bound).numpy() * (1 + UP) > least[i])
    at = np.flatnonzero(other)
    values[at] = value(i[at], j[at])
    at = np.flatnonzero(first | other)
    i, j, values = i[at], j[at], values[at]
    per_row = np.bincount(i, minlength=rows)
    place = np.arange(len(i)) - (per_row.cumsum() - per_row)[i]  # among its row's
    table = np.full((rows, max(k, per_row.max())), -np.inf, np.float32)  # [rows, candidates]
    column = np.zeros(table.shape, np.int64)
    table[i, place], column[i, place] = values, j
    if (more := table.shape[1] - k) > 0:
        largest = np.argpartition(table, more, axis=1)[:, more:]  # [rows, k]
        table, column = (np.take_along_axis(t, largest, axis=1) for t in (table, column))
    kept = table > 0
    return kept.nonzero()[0], column[kept], table[kept]


def _up(t: Tensor) -> Tensor:
    """bfloat16, not below ``t``."""
    return (t + t.abs() * UP).bfloat16()


def _float(bits: np.ndarray) -> Tensor:
    return torch.from_numpy(bits).view(torch.bfloat16).float()
