"""What a training run is refused for before it starts."""

from collections.abc import Iterator

import torch
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor

DEAD = ("none", "post", "anthropic", "aux_k")


def require(saes: dict[str, TrainingSAE], batches: object, steps: float, dead: str, every: dict[str, int]) -> None:
    """Options of :func:`saeutils.training.train` that cannot be.

    Raises:
        ValueError: it names the argument and the fix.
    """
    if dead not in DEAD:
        raise ValueError(f"unknown dead={dead!r}: one of {DEAD}")
    if not saes:
        raise ValueError("no SAE to train: give at least one")
    if steps != int(steps) or steps < 1 or min(every.values()) < 1:
        raise ValueError(f"steps={steps} and {every} must be whole numbers of at least 1")
    if hasattr(batches, "batches"):
        raise ValueError("batches: give the method, functools.partial(acts.batches, 4096), not the activations")
    for sae in saes.values():
        if sae.dtype != torch.float32:
            raise ValueError(f"the SAE is in {sae.dtype}, in which Adam's small steps are lost: build it with dtype='float32'")
        if torch.is_autocast_enabled(sae.device.type):
            raise ValueError("train inside torch.autocast would compute in another precision than it says: leave the block")


def first(stream: Iterator[Tensor], saes: dict[str, TrainingSAE]) -> Tensor:
    """The first batch, [batch, d_in].

    Raises:
        ValueError: there is none, of another width, or with NaN or inf.
    """
    first = next(stream, None)
    if first is None:
        raise ValueError("batches is empty")
    for sae in saes.values():
        if first.ndim != 2 or first.shape[1] != sae.cfg.d_in:
            raise ValueError(
                f"batches are {tuple(first.shape)}, the SAE expects [batch, {sae.cfg.d_in}]: same hook point?"
            )
    if not torch.isfinite(first).all():
        raise ValueError("the first batch has NaN or inf: collect the activations in float32 or bfloat16")
    return first
