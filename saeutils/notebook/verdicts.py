"""The rule by which a claim is judged: yes, no or cannot tell, from the units, a bar set before and the nearest rival.

Pure functions; :class:`saeutils.notebook.claims.Ledger` keeps what they say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import numpy as np
import pandas as pd

from saeutils import metrics
from saeutils.kernels.door import door
from saeutils.metrics import Interval

YES, NO, CANNOT, EXPLORATORY = "yes", "no", "cannot tell", "exploratory"
FEWEST = 3  # units
MEASURED = re.compile(r"\d*\.\d+|\d+(?:\.\d+)?\s?%")


@dataclass(frozen=True)
class Bar:
    """Where a figure must lie for the claim to hold; made by :func:`at_least`, :func:`at_most`, :func:`between`."""

    low: float
    high: float

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"at least {self.low:g}"
        return f"at most {self.high:g}" if math.isinf(self.low) else f"between {self.low:g} and {self.high:g}"

    @property
    def direction(self) -> int:
        """1: upwards, −1: downwards, 0: both sides are bounded."""
        return int(math.isinf(self.high)) - int(math.isinf(self.low))

    @property
    def at_zero(self) -> bool:
        """Is the bar a comparison with 0 (a sign, or parity), not a level?"""
        return self.low + self.high == 0 if not self.direction else (self.low if self.direction > 0 else self.high) == 0

    def side(self, x: Interval) -> int:
        """0: the whole interval is inside the bar, 1: above it, −1: below it; 2: it crosses an edge."""
        if self.low <= x.low and x.high <= self.high:
            return 0
        return 1 if x.low > self.high else -1 if x.high < self.low else 2


def at_least(bar: float) -> Bar:
    """The figure must be ``bar`` or more."""
    door(bar=bar)
    return between(float(bar), math.inf)


def at_most(bar: float) -> Bar:
    """The figure must be ``bar`` or less."""
    door(bar=bar)
    return between(-math.inf, float(bar))


def between(low: float, high: float) -> Bar:
    """The figure must lie from ``low`` to ``high``: parity, or a number of a source with its margin.

    Raises:
        ValueError: the wrong way round, NaN, or no bound at all.
    """
    if not all(isinstance(b, (Real, np.number)) for b in (low, high)):
        raise ValueError(f"low={low!r}, high={high!r}: expected two numbers")
    if not low < high or (math.isinf(low) and math.isinf(high)):
        raise ValueError(f"a bar from {low} to {high} is the wrong way round or empty: between(low, high) with low < high")
    return Bar(float(low), float(high))


class Verdict(NamedTuple):
    """What the rule says of a claim, why, and the figures that it saw."""

    holds: str
    why: str
    here: Interval
    control: Interval
    ceiling: Interval | None
    units: int


def verdict(
    values: object, bar: Bar, control: object, ceiling: object = None, *, statistic: str | Callable = "mean", items: int | None = None
) -> Verdict:
    """Judge ``values`` against ``bar`` and ``control`` by the rule of this collection (README of ``figures/`` states it).

    Args:
        values, control, ceiling: one number for each independent unit, [units], or [units, items]. Series with one index,
            or arrays, are the same units in order; Series with quite another index are other units.
        statistic, items: see :func:`saeutils.metrics.interval`.

    Raises:
        ValueError: NaN, infinite, empty or unequal values; a constant in the control's place; a ``bar`` of another kind.
    """
    if not isinstance(bar, Bar):
        raise ValueError(f"the bar is {bar!r}: make it with at_least(b), at_most(b) or between(low, high)")
    values, control, paired = _aligned(values, control)
    ceiling = None if ceiling is None else _array("ceiling", ceiling)
    here, least = (metrics.interval(x, statistic, items) for x in (values, control))
    best = None if ceiling is None else metrics.interval(ceiling, statistic, items)
    gap = metrics.difference(values, control, statistic, items, paired)
    holds, why = _rule(bar, here, least, best, gap, len(values), _unbounded(values, control, statistic, items))
    return Verdict(holds, why, here, least, best, len(values))


def _unbounded(values: np.ndarray, control: np.ndarray, statistic: str | Callable, items: int | None) -> str:
    """Why no interval can be given, if so."""
    if len(values) < FEWEST:
        return f"{len(values)} units, {FEWEST} are needed"
    if statistic != "mean" and min(len(values), len(control)) < metrics.FEWEST:
        return f"{len(values)} units, a bootstrap needs {metrics.FEWEST}"
    for whose, x in (("its units", values), ("the control's units", control)):
        if items is None and np.ptp(x) == 0:
            return f"{whose} all have the same number and so no interval: say of how many items it is a share"
    return ""


def _rule(
    bar: Bar, here: Interval, control: Interval, ceiling: Interval | None, gap: Interval, units: int, unbounded: str
) -> tuple[str, str]:
    if unbounded:
        return CANNOT, unbounded
    side, rival = bar.side(here), bar.side(control)
    if side == 2:
        return CANNOT, "the interval crosses the bar"
    if side == 0 and rival == 0:
        return CANNOT, "the control passes too"
    if side == 0 and bar.direction == 0:
        return (YES, "inside the bar, the control outside") if rival != 2 else (CANNOT, "the control may be inside the bar too")
    if side == 0:
        beyond = gap.low if bar.direction > 0 else -gap.high
        return (YES, f"{units} units, beyond bar and control") if beyond > 0 else (CANNOT, "no better than the control")
    where = "above" if side > 0 else "below"
    if not bar.at_zero and (ceiling is None or bar.side(ceiling) != 0):
        return CANNOT, f"{where} the bar, but nothing here could pass: " + ("no ceiling" if ceiling is None else "nor does the ceiling")
    return NO, f"the whole interval is {where} the bar"


def numbers(name: str, x: object) -> np.ndarray:
    """``x`` as an array of numbers, a row a unit.

    Raises:
        ValueError: it is one number, or no numbers.
    """
    if np.ndim(x) == 0:
        raise ValueError(f"{name} is {x!r}: give one number for each unit, measured by the same function; a constant is none")
    try:
        return np.asarray(x, dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is no list of numbers: give one for each unit") from error


def _array(name: str, x: object) -> np.ndarray:
    found = numbers(name, x)
    if not found.size:
        raise ValueError(f"{name} is empty: give one number for each unit")
    if not np.isfinite(found).all():
        raise ValueError(f"{name} has NaN or infinite numbers: leave units that gave none out of values and control alike")
    return found


def _aligned(values: object, control: object) -> tuple[np.ndarray, np.ndarray, bool]:
    """(values, control, whether row i of both is the same unit)."""
    first, second, paired = _array("values", values), _array("control", control), True
    if isinstance(values, pd.Series) and isinstance(control, pd.Series) and not values.index.equals(control.index):
        shared = values.index.intersection(control.index)
        if len(shared) not in (0, len(values)) or len(control) != len(values):
            raise ValueError(f"values and control share {len(shared)} of {len(values)} units: give both the same ones, or others")
        paired = len(shared) > 0
        second = control.reindex(values.index).to_numpy(float) if paired else second
    if first.shape != second.shape:
        raise ValueError(f"values are {first.shape}, the control {second.shape}: give the control as many units, of its own kind")
    return first, second, paired


def without_numbers(claim: str) -> str:
    """``claim``, if its text can stay while results change.

    Raises:
        ValueError: it is empty, or holds a decimal fraction or a percentage.
    """
    if not claim.strip():
        raise ValueError("the claim is empty: say in a sentence what is claimed")
    if found := MEASURED.search(claim):
        raise ValueError(
            f"the claim {claim!r} holds the number {found[0]}: what is measured changes from run to run, and a setting or a "
            "bar belongs into paper, bar or note"
        )
    return claim


def joined(verdicts: list[tuple[str, str]]) -> tuple[str, str]:
    """(holds, why) of a claim from those of its runs: theirs if two or more agree, else cannot tell."""
    if len(verdicts) < 2:
        return CANNOT, "one run only"
    if len({holds for holds, _ in verdicts}) > 1:
        return CANNOT, "the two runs disagree: " + ", ".join(holds for holds, _ in verdicts)
    return verdicts[0]
