"""Figures: functions that take arrays and an ``ax``; line styles differ as well as colours."""

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
MARKERS = "osD^vPX"


def save(fig: Figure, folder: Path, name: str, data: pd.DataFrame | None = None) -> None:
    """Write ``name.png`` and the numbers behind it as ``name.csv``, each under a temporary name first."""
    tmp = folder / f".{name}.png"
    fig.savefig(tmp, dpi=130, bbox_inches="tight")
    os.replace(tmp, folder / f"{name}.png")
    if data is not None:
        tmp = folder / f".{name}.csv"
        data.to_csv(tmp, index=False, float_format="%.6g")
        os.replace(tmp, folder / f"{name}.csv")


def lines(
    ax: Axes, data: pd.DataFrame, x: str, y: str, by: str, *, low: str | None = None, high: str | None = None,
    order: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """One line for each value of ``by``, with a band from ``low`` to ``high`` where given."""
    names = list(order) if order is not None else list(dict.fromkeys(data[by]))
    for name, style, marker in zip(names, itertools.cycle(STYLES), itertools.cycle(MARKERS)):
        part = data[data[by] == name].sort_values(x)
        few = len(part) <= 20
        (line,) = ax.plot(part[x], part[y], ls=style, marker=marker if few else None, ms=4, label=str(name))
        if low and high:
            ax.fill_between(part[x], part[low], part[high], color=line.get_color(), alpha=0.15, lw=0)
    ax.set(xlabel=x, ylabel=y)
    ax.grid(alpha=0.25)


def reference(ax: Axes, value: float, label: str, axis: str = "y") -> None:
    """A thin dotted reference line with its label in the legend."""
    draw = ax.axhline if axis == "y" else ax.axvline
    draw(value, color="0.4", ls=":", lw=1.3, label=label)


def histogram(ax: Axes, values: np.ndarray, label: str = "", bins: int = 40, log: bool = True, **style) -> None:
    """Histogram of values, logarithmic counts by default."""
    ax.hist(values, bins=bins, label=label or None, alpha=0.7, **style)
    if log and len(values):
        ax.set_yscale("log")
    ax.set_ylabel("count")


def bars(ax: Axes, heights: Mapping[str, tuple[float, float, float]], xlabel: str = "") -> None:
    """Horizontal bars with intervals: label → (value, low, high)."""
    for i, (value, low, high) in enumerate(heights.values()):
        ax.barh(i, value, color="C0", alpha=0.75)
        ax.plot([low, high], [i, i], color="0.2", lw=1.5)
    ax.set_yticks(range(len(heights)), list(heights))
    ax.invert_yaxis()
    ax.set_xlabel(xlabel)
    ax.grid(axis="x", alpha=0.25)


def panels(n: int, width: float = 5.2, height: float = 3.6) -> tuple[Figure, np.ndarray]:
    """A row of ``n`` axes."""
    fig, axes = plt.subplots(1, n, figsize=(width * n, height), squeeze=False, layout="constrained")
    return fig, axes[0]
