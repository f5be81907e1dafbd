"""What a training run is refused for before it starts."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor

from saeutils.kernels.door import door, optionally

DEAD = ("none", "post", "anthropic", "aux_k")


@dataclass(frozen=True)
class Options:
    """What :func:`saeutils.training.train` was asked for, as its arguments name it."""

    steps: int = 1
    unit_norm: bool = True
    median_rows: int = 16_384
    dead: str = "none"
    dead_every: int = 500
    dead_until: float = 0.8
    dead_threshold: float = 1e-5
    aux_k: float = 1 / 32
    log_every: int = 10
    checkpoint_every: int = 500
    callback: Callable[[int, TrainingSAE, dict], None] | None = None
    seed: int = 0
    order: int | None = None  # seed of an order of its own


def require(saes: dict[str, TrainingSAE], batches: object, dead: str, **options) -> None:
    """Options of :func:`saeutils.training.train` that cannot be.

    Raises:
        ValueError: it names the argument and the fix.
    """
    if isinstance(steps := options["steps"], float) and steps.is_integer():  # 1e5
        options["steps"] = int(steps)
    optionally(warm_up=options.pop("warm_up"), decay=options.pop("decay"))
    door(**options)
    if not isinstance(dead, str) or dead not in DEAD:
        raise ValueError(f"unknown dead={dead!r}: one of {DEAD}")
    if not saes:
        raise ValueError("no SAE to train: give at least one")
    if hasattr(batches, "batches"):
        raise ValueError("batches: give the method, functools.partial(acts.batches, 4096), not the activations")
    if not callable(batches) and not isinstance(batches, Iterable):
        raise ValueError(f"batches={batches!r}: expected tensors [batch, d_in], or a function start=step → their iterator")
    for sae in saes.values():
        door(sae=sae)
        if sae.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the SAE is in {sae.dtype}, in which Adam's small steps are lost: build it with dtype='float32'")
        if torch.is_autocast_enabled(sae.device.type):
            raise ValueError("train inside torch.autocast would compute in another precision than it says: leave the block")


def plain(value: object) -> object:
    """A number, or several, as Python's own: NumPy's and PyTorch's cannot be read back from a checkpoint."""
    if isinstance(value, tuple | list):
        return tuple(map(plain, value))
    return value.item() if hasattr(value, "item") else value


def first(stream: Iterator[Tensor], saes: dict[str, TrainingSAE]) -> Tensor:
    """The first batch, [batch, d_in].

    Raises:
        ValueError: there is none, of another width, or with NaN or inf.
    """
    first = next(stream, None)
    if not isinstance(first, Tensor):
        found = "is empty" if first is None else f"gives a {type(first).__name__}"
        raise ValueError(f"batches {found}: expected tensors [batch, d_in]")
    for sae in saes.values():
        if first.ndim != 2 or first.shape[1] != sae.cfg.d_in:
            raise ValueError(
                f"batches are {tuple(first.shape)}, the SAE expects [batch, {sae.cfg.d_in}]: same hook point?"
            )
    if not torch.isfinite(first).all():
        raise ValueError("the first batch has NaN or inf: collect the activations in float32 or bfloat16")
    return first
