"""The ledger of claims: what a source reports beside what this notebook measured."""

import math
import os
from pathlib import Path

import numpy as np
import pandas as pd

from saeutils.lm import archives
from saeutils.notebook import scales

COLUMNS = ["claim", "source", "paper", "here", "low", "high", "holds", "scale", "control", "note"]
JUDGEMENTS = ("yes", "no", "not judged")


def root() -> Path:
    """The checkout around the working directory or this package; else the working directory (Colab)."""
    for start in (Path.cwd(), Path(__file__).parent):
        for folder in (start, *start.parents):
            if (folder / "pyproject.toml").exists() and (folder / "notebooks").is_dir():
                return folder
    return Path.cwd()


def figures_dir(notebook: str, scale: str) -> Path:
    """``figures/NOTEBOOK``; for a rehearsal (smoke, capped) a folder in the cache, so that results are not overwritten."""
    base = archives.cache_dir("rehearsal") if scales.rehearsal(scale) else root() / "figures"
    folder = base / notebook
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Ledger:
    """Claims of one notebook run; every :meth:`add` rewrites ``claims.csv``."""

    def __init__(self, notebook: str, scale: str):
        self.folder, self.scale = figures_dir(notebook, scale), scale
        self.rows: list[dict] = []

    def add(
        self, claim: str, source: str, paper: str | float, here: float, *, low: float, high: float,
        holds: bool | None, control: float | str = "", note: str = "",
    ) -> None:  # fmt: skip
        """Record one claim.

        Args:
            paper: the published figure. here, low, high: ours and its interval over seeds or resamples.
            holds: None where it cannot be judged; a rehearsal never judges.
            control: the figure that the control reached.

        Raises:
            ValueError: the interval does not contain the figure.
        """
        slack = 1e-9 * max(abs(low), abs(high))  # a mean of equal numbers may round past them
        if math.isfinite(here) and not low - slack <= here <= high + slack:
            raise ValueError(f"{claim}: {here} lies outside its interval [{low}, {high}]")
        judged = "not judged" if holds is None or scales.rehearsal(self.scale) else "yes" if holds else "no"
        values = [
            claim,
            source,
            paper,
            *(_short(v) for v in (here, min(low, here), max(high, here))),
            judged,
            self.scale,
            _short(control),
            note,
        ]
        self.rows.append(dict(zip(COLUMNS, values)))
        path = self.folder / "claims.csv"
        self.table().to_csv(path.with_suffix(".tmp"), index=False)
        os.replace(path.with_suffix(".tmp"), path)

    def table(self) -> pd.DataFrame:
        """The ledger as a table."""
        return pd.DataFrame(self.rows, columns=COLUMNS)


def _short(value: float | str) -> float | str:
    return value if isinstance(value, str) else float(f"{value:.4g}")


def bootstrap(
    values: np.ndarray, statistic=np.mean, n: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Statistic of ``values`` (resampled along the first axis) and its percentile interval: (here, low, high).

    Where rows are prompts or seeds, this is the interval over prompts or seeds.
    """
    values = np.asarray(values)
    rng = np.random.default_rng(seed)
    draws = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(n)]
    here = float(statistic(values))
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return here, float(min(low, here)), float(max(high, here))


def all_claims() -> pd.DataFrame:
    """Every committed ``claims.csv``, with the notebook's name."""
    paths = sorted((root() / "figures").glob("*/claims.csv"))
    tables = [pd.read_csv(p, keep_default_na=False).assign(notebook=p.parent.name) for p in paths]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=[*COLUMNS, "notebook"])
