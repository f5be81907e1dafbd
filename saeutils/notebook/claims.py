"""The ledger of claims: what a source reports beside what this notebook measured, judged by a rule."""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from saeutils.kernels import files
from saeutils.kernels.door import door
from saeutils.metrics import Interval
from saeutils.notebook import scales, verdicts
from saeutils.notebook.verdicts import Bar, at_least, at_most, between

__all__ = ["Bar", "Ledger", "all_claims", "at_least", "at_most", "between", "figures_dir", "judged", "read_claims", "root"]
COLUMNS = ["claim", "source", "paper", "here", "low", "high", "bar", "control", "control_low", "control_high", "ceiling", "holds", "why", "units", "scale", "run", "machine", "date", "commit", "note"]
JUDGEMENTS = (verdicts.YES, verdicts.NO, verdicts.CANNOT, verdicts.EXPLORATORY)
AT_MOST = 8  # claims a notebook


def root() -> Path:
    """The checkout around the working directory or this package; else the working directory (Colab)."""
    for start in (Path.cwd(), files.PACKAGE):
        for folder in (start, *start.parents):
            if (folder / "pyproject.toml").exists() and (folder / "notebooks").is_dir():
                return folder
    return Path.cwd()


def figures_dir(notebook: str, scale: str) -> Path:
    """Where a run's figures and ledger go: ``data/cache/runs/NOTEBOOK``, so that committed ones stay as they are.

    With ``SAEUTILS_KEEP=1``: ``figures/NOTEBOOK``; a rehearsal's (smoke, capped): ``data/cache/rehearsal/NOTEBOOK``.
    """
    if scales.rehearsal(scale):
        return files.cache_dir("rehearsal", notebook)
    if not scales.keep():
        return files.cache_dir("runs", notebook)
    folder = root() / "figures" / notebook
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Ledger:
    """Claims of one notebook run; every :meth:`judge` rewrites ``claims.csv``, where rows of other scales and runs stay.

    Raises:
        ValueError: the ledger on disk is unreadable.
    """

    def __init__(self, notebook: str, scale: str):
        door(notebook=notebook)
        if scale not in scales.SCALES:
            raise ValueError(f"scale={scale!r}: expected what scales.choose gives, one of {', '.join(scales.SCALES)}")
        self.folder, self.scale, self.run = figures_dir(notebook, scale), scale, scales.run()
        self.path = self.folder / "claims.csv"
        self.rows: list[dict] = []
        self._seen: dict[str, np.ndarray] = {}
        self._earlier = read_claims(self.path)  # before long work: an error in a file is told now
        committed = root() / "figures" / notebook / "claims.csv"
        self._bars = pd.concat([self._earlier, read_claims(committed)])[["claim", "bar", "holds", "scale", "run"]]

    def judge(
        self, claim: str, *, source: str, paper: str | float, values: object, bar: Bar, control: object,
        ceiling: object = None, statistic: str | Callable = "mean", items: int | None = None, note: str = "",
    ) -> str:  # fmt: skip
        """Judge a claim by :func:`saeutils.notebook.verdicts.verdict`, keep it, and return the verdict in a sentence.

        Args:
            claim: a sentence that stays when results change. source, paper: who claims it, and the published figure.
            values: one number for each independent unit (a seed, an LM, a prompt), or [units, items].
            bar: set before the first result. control: its nearest rival, by the same function, with as many units.
            ceiling: the same where the claim must hold; a "no" against a level needs it.
            statistic, items: as for :func:`saeutils.metrics.interval`.

        Raises:
            ValueError: see ``verdict``; a claim judged twice in a run, or under another name; a ninth claim; the paper's own
                number beyond the bar; a number in the claim's text.
        """
        own = verdicts.numbers("values", values)
        self._check(claim, paper, bar, own)
        if scales.rehearsal(self.scale):  # too small to say anything: only that all of this runs
            self._seen[claim] = own
            return f"not judged at {self.scale}: {claim}"
        found = verdicts.verdict(values, bar, control, ceiling, statistic=statistic, items=items)
        self._seen[claim] = own
        holds, why = self._exploratory(claim, bar, found)
        best = "" if found.ceiling is None else _shown(found.ceiling)
        measured = [*map(_short, found.here), str(bar), *map(_short, found.control), best]
        made = [self.scale, self.run, _machine(), datetime.date.today().isoformat(), _commit(), note]
        self.rows.append(dict(zip(COLUMNS, [claim, source, paper, *measured, holds, why, found.units, *made])))
        self._write()
        return f"{holds}: {claim} ({why}; {_shown(found.here)} against {bar}, control {_shown(found.control)})"

    def _check(self, claim: str, paper: str | float, bar: Bar, own: np.ndarray) -> None:
        verdicts.without_numbers(claim)
        if claim in self._seen:
            raise ValueError(f"{claim!r} was judged in this run already: one claim, one verdict (or start from the first cell)")
        if len(self._seen) == AT_MOST:
            raise ValueError(f"{claim!r} is a ninth claim: at most {AT_MOST} a notebook, the rest into a table or a figure")
        if not isinstance(bar, Bar):
            raise ValueError(f"the bar of {claim!r} is {bar!r}: make it with at_least(b), at_most(b) or between(low, high)")
        if isinstance(paper, int | float) and bar.side(Interval(paper, paper, paper)) != 0:
            raise ValueError(f"the paper's own {paper} is not {bar}: is the bar of {claim!r} the wrong way round?")
        if scales.rehearsal(self.scale):
            return  # its three prompts may well agree in two claims
        for other, seen in self._seen.items():
            if np.ptp(seen) > 0 and np.array_equal(seen, own):
                raise ValueError(f"{claim!r} has the values of {other!r}: one number is judged once")

    def _exploratory(self, claim: str, bar: Bar, found: verdicts.Verdict) -> tuple[str, str]:
        """The verdict; "exploratory" where an earlier row of the claim had another bar, and from then on."""
        before = self._bars[self._bars["claim"] == claim]
        changed = sorted(set(before["bar"]) - {str(bar)})
        if not changed and verdicts.EXPLORATORY not in set(before["holds"]):
            return found.holds, found.why
        return verdicts.EXPLORATORY, f"the bar was changed ({', '.join(changed) or 'before'}); by the new one: {found.holds}"

    def _write(self) -> None:
        others = self._earlier
        others = others[(others["scale"] != self.scale) | (others["run"] != self.run)]
        with files.whole(self.path) as tmp:
            pd.concat([others, self.table()]).to_csv(tmp, index=False)

    def table(self) -> pd.DataFrame:
        """The claims of this run as a table."""
        return pd.DataFrame(self.rows, columns=COLUMNS)


def _short(value: float | str) -> float | str:
    return value if isinstance(value, str) else float(f"{value:.4g}")


def _shown(x: Interval) -> str:
    return f"{x.here:.3g} [{x.low:.3g}, {x.high:.3g}]"


def _machine() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else []
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def _commit() -> str:
    """The commit of the checkout, with a + where files of the package or notebooks differ from it; empty without git."""
    def git(*arguments: str) -> str:
        call = subprocess.run(["git", *arguments], cwd=root(), capture_output=True, text=True)
        return call.stdout.strip() if call.returncode == 0 else ""

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "saeutils", "notebooks") else "")
    except FileNotFoundError:
        return ""


def read_claims(path: Path) -> pd.DataFrame:
    """The rows of one ``claims.csv``, columns COLUMNS; empty where it is missing.

    Raises:
        ValueError: it has been edited into something that is no ledger.
    """
    empty = pd.DataFrame(columns=COLUMNS).astype({"run": int})
    if not path.exists():
        return empty
    advice = f"{path} is no ledger any more: bring it back (git checkout {path.name}) or delete it, and run its notebook again"
    try:
        found = pd.read_csv(path, keep_default_na=False)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(advice) from error
    numbers = found[["run", "here", "low", "high"]].apply(pd.to_numeric, errors="coerce") if list(found.columns) == COLUMNS else None
    if numbers is None or numbers.isna().any(axis=None) or not set(found["holds"]) <= set(JUDGEMENTS):
        raise ValueError(advice)
    return found.astype({"run": int})


def all_claims() -> pd.DataFrame:
    """The committed ledgers: every row, with the notebook's name.

    Raises:
        ValueError: one is unreadable.
    """
    paths = sorted((root() / "figures").glob("*/claims.csv"))
    return pd.concat([read_claims(p).assign(notebook=p.parent.name) for p in paths] or [pd.DataFrame(columns=[*COLUMNS, "notebook"])])


def judged(table: pd.DataFrame) -> pd.DataFrame:
    """One row a claim from rows of several scales and runs: for each run its largest scale, and the verdict of both runs.

    Columns: those of the first run's row; ``holds`` and ``why`` are those of both, see ``verdicts.joined``; ``both``: what
    each run measured; ``scale``: that of each where they differ.
    """
    order = {name: i for i, name in enumerate(scales.SCALES)}
    rows = []
    for _, same in table.groupby(["notebook", "claim"], sort=False):
        ranked = same.assign(size=same["scale"].map(order)).sort_values(["run", "size"])
        largest = ranked.groupby("run").tail(1)
        holds, why = verdicts.joined(list(zip(largest["holds"], largest["why"])))
        shown = [f"{r['here']:.3g} [{r['low']:.3g}, {r['high']:.3g}]" for r in largest.to_dict("records")]
        found = {"holds": holds, "why": why, "both": "; ".join(shown), "scale": "; ".join(largest["scale"].unique())}
        rows.append(largest.iloc[0].drop("size").to_dict() | found)
    return pd.DataFrame(rows, columns=[*table.columns, "both"])
