"""A few numbers by which tensors are known again, on another processor too: what a resumed run began with, and saw."""

import torch
from torch import Tensor

TOLERANCE = 1e-3  # far above what another processor rounds otherwise, far below another seed


@torch.no_grad()
def trace(x: Tensor, n: int = 8) -> list[float]:
    """The norm of a tensor, and ``n`` projections of it on fixed random signs, divided by the norm."""
    x = x.detach().to("cpu", torch.float32)
    x = x.reshape(len(x), -1) if x.ndim else x.reshape(1, 1)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(0, 2, (size, n), generator=generator) * 2.0 - 1 for size in x.shape)
    norm = x.norm()
    return [float(norm), *((x @ right * left).sum(0) / norm.clamp_min(1e-30)).tolist()]


def of(module: torch.nn.Module) -> dict[str, list[float]]:
    """:func:`trace` of each of a module's tensors."""
    return {name: trace(tensor) for name, tensor in module.state_dict().items()}


def alike(a: list[float], b: list[float]) -> bool:
    """Are two traces of one tensor, but for rounding?"""
    return len(a) == len(b) and all(abs(x - y) <= TOLERANCE * max(1, abs(x)) for x, y in zip(a, b))


def all_alike(a: dict[str, list[float]], b: dict[str, list[float]]) -> bool:
    """Are two modules' traces those of one module?"""
    return a.keys() == b.keys() and all(alike(a[name], b[name]) for name in a)
