"""Figures: functions that take arrays and an ``ax``; one style for the whole collection, set by :func:`panels`."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from saeutils.kernels import files

# Okabe and Ito's colours, told apart by colour-blind readers too; line styles differ with them
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
MARKERS = "osD^vPX"
WIDEST = 10.0  # inches: a notebook's column on a laptop, where wider figures are shrunk and their letters with them
STYLE = {
    "font.size": 10, "axes.titlesize": 10, "axes.labelsize": 10, "legend.fontsize": 9, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "axes.prop_cycle": cycler(color=COLOURS), "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.25, "axes.spines.top": False,
    "axes.spines.right": False, "lines.linewidth": 1.6, "legend.frameon": False, "figure.dpi": 100, "savefig.dpi": 130,
}  # fmt: skip


def panels(n: int, width: float = 5.2, height: float = 3.6) -> tuple[Figure, np.ndarray]:
    """A row of ``n`` axes in the collection's style, each ``width`` × ``height`` inches, together at most 10 wide."""
    plt.rcParams.update(STYLE)
    fig, axes = plt.subplots(1, n, figsize=(min(width * n, WIDEST), height), squeeze=False, layout="constrained")
    return fig, axes[0]


def save(fig: Figure, folder: Path, name: str, data: pd.DataFrame | None = None) -> None:
    """Write ``name.png`` and the numbers behind it as ``name.csv``, each whole or not at all."""
    with files.whole(folder / f"{name}.png") as tmp:
        fig.savefig(tmp, bbox_inches="tight")
    if data is not None:
        with files.whole(folder / f"{name}.csv") as tmp:
            data.to_csv(tmp, index=False, float_format="%.6g")


def lines(
    ax: Axes, data: pd.DataFrame, x: str, y: str, by: str, *, low: str | None = None, high: str | None = None,
    order: Sequence[str] | None = None, along: str | None = None,
) -> None:  # fmt: skip
    """One line for each value of ``by``, with a band from ``low`` to ``high`` where given; ``along``: what joins its points, else ``x``.

    ``order``: all values that there might be; each keeps its colour, and the legend leaves out those without a point.
    """
    names = list(order) if order is not None else list(dict.fromkeys(data[by]))
    for name, style, marker in zip(names, itertools.cycle(STYLES), itertools.cycle(MARKERS)):
        part = data[data[by] == name].sort_values(along or x)
        few, label = len(part) <= 20, str(name) if len(part) else None
        (line,) = ax.plot(part[x], part[y], ls=style, marker=marker if few else None, ms=4, label=label)
        if low and high:
            ax.fill_between(part[x], part[low], part[high], color=line.get_color(), alpha=0.15, lw=0)
    ax.set(xlabel=x, ylabel=y)


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
        ax.barh(i, value, color=COLOURS[0], alpha=0.75)
        ax.plot([low, high], [i, i], color="0.2", lw=1.5)
    ax.set_yticks(range(len(heights)), list(heights))
    ax.invert_yaxis()
    ax.set_xlabel(xlabel)
    ax.grid(visible=False, axis="y")
