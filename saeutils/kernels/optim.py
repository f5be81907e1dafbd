"""What a step does around the gradients: one fused kernel, decoder rows at unit norm."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

CHUNK = 512  # decoder rows handled at a time, so that gradient and weights meet in the processor's cache


def fuse(optimizer: torch.optim.Adam) -> None:
    """One kernel for all parameters (a loaded state brings back the flags it was saved with)."""
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = True, False


@contextmanager
def row_major(optimizer: torch.optim.Adam) -> Iterator[None]:
    """Column-major weights pass for their transposes inside: the fused kernel would first copy their gradients."""
    weights = [p for group in optimizer.param_groups for p in group["params"] if p.ndim == 2 and not p.is_contiguous()]
    for weight in weights:
        _turn(optimizer, weight)
    try:
        yield
    finally:
        for weight in weights:
            _turn(optimizer, weight)


def _turn(optimizer: torch.optim.Adam, weight: Parameter) -> None:
    grad, weight.grad = weight.grad, None
    weight.data = weight.data.T
    weight.grad = None if grad is None else grad.T
    state = optimizer.state.get(weight, {})
    for moment in state.keys() & {"exp_avg", "exp_avg_sq"}:
        state[moment] = state[moment].T


@torch.no_grad()
def remove_parallel_gradient(W_dec: Tensor) -> None:
    """Project each row's gradient onto the tangent of its unit sphere: g ← g − (g·w)w (Bricken et al. 2023)."""
    for grad, row in zip(_chunks(W_dec.grad), _chunks(W_dec)):
        grad.sub_((grad * row).sum(1, keepdim=True) * row)


@torch.no_grad()
def normalise_rows(W_dec: Tensor) -> None:
    """Every row back to norm 1, in place."""
    for row in _chunks(W_dec):
        row.div_(row.norm(dim=1, keepdim=True).clamp_min(1e-8))


def _chunks(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split(CHUNK if rows.device.type == "cpu" else len(rows))  # a GPU waits for launches, not for memory
