"""Which scale runs: one variable, one table a notebook, no ``if scale ==`` anywhere else."""

import os
from types import SimpleNamespace

import pandas as pd

SCALES = ("smoke", "laptop", "colab", "paper")


def current(scale: str = "auto") -> str:
    """``scale`` unless it is "auto"; then ``$SAEUTILS_SCALE``; then ``colab`` with a GPU and ``laptop`` without.

    Raises:
        ValueError: not one of the scales.
    """
    if scale == "auto":
        import torch  # late: what only reads claims or figures need not wait for it

        scale = os.environ.get("SAEUTILS_SCALE") or ("colab" if torch.cuda.is_available() else "laptop")
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}: one of {SCALES}, or 'auto'")
    return scale


def caps() -> dict[str, int]:
    """``$SAEUTILS_CAP``, such as ``tokens=4000,steps=8``: upper bounds for a rehearsal of the larger scales."""
    pairs = (p.split("=") for p in os.environ.get("SAEUTILS_CAP", "").split(",") if p)
    return {name: int(value) for name, value in pairs}


def rehearsal(scale: str) -> bool:
    """True where results are not to be judged or kept: at ``smoke``, and under a cap."""
    return scale == "smoke" or bool(caps())


def _capped(value, bound: int):
    """At most ``bound``; of a list its first ones, at least two, so that pairs and series remain."""
    return value[: max(bound, 2)] if isinstance(value, list) else min(value, bound)


def choose(scale: str, table: dict[str, dict]) -> tuple[SimpleNamespace, pd.DataFrame]:
    """The settings of the scale that runs, and the table of all scales to show (settings × scales).

    A scale gives only what differs from the one before it. Settings named in :func:`caps` are cut to their bound.
    """
    name, filled, last = current(scale), {}, {}
    for s in SCALES:
        last = filled[s] = {**last, **table.get(s, {})}
    shown = pd.DataFrame(filled).rename(columns={name: f"{name} ← runs"})
    settings = {k: _capped(v, caps()[k]) if k in caps() else v for k, v in filled[name].items()}
    return SimpleNamespace(scale=name, **settings), shown
