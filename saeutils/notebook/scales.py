"""Which scale runs, and which of two runs: variables read in one place, one table a notebook, no ``if scale ==`` elsewhere."""

import os
from types import SimpleNamespace

import pandas as pd

from saeutils.kernels.door import door
from saeutils.kernels.jobs import caps

# scale → the one that it differs from
PARENTS = {"smoke": None, "laptop": "smoke", "overnight": "laptop", "colab": "laptop", "paper": "colab"}
SCALES = tuple(PARENTS)


def _variable(name: str, allowed: str, fine) -> str | None:
    """The variable's text, or None where it is not set.

    Raises:
        ValueError: it is blank, or not ``fine``.
    """
    text = os.environ.get(name)
    if text is not None and not fine(text):
        raise ValueError(f"{name} is {text!r}: set it to {allowed} without blanks, or unset it")
    return text


def current(scale: str = "auto") -> str:
    """``scale`` unless it is "auto"; then ``$SAEUTILS_SCALE``; then ``colab`` with a GPU and ``laptop`` without.

    Raises:
        ValueError: not one of the scales.
    """
    if scale != "auto":
        if not isinstance(scale, str) or scale not in SCALES:
            raise ValueError(f"unknown scale={scale!r}: one of {', '.join(SCALES)}, or 'auto'")
        return scale
    if found := _variable("SAEUTILS_SCALE", f"one of {', '.join(SCALES)}", SCALES.__contains__):
        return found
    import torch  # late: what only reads claims or figures need not wait for it

    return "colab" if torch.cuda.is_available() else "laptop"


def run() -> int:
    """Which run this is: ``$SAEUTILS_SEED``, 0 where it is not set. Every notebook is judged on two.

    Raises:
        ValueError: not a whole number of at most three digits.
    """
    return int(_variable("SAEUTILS_SEED", "a whole number from 0 to 999", lambda t: t.isdecimal() and len(t) <= 3) or 0)


def seed(i: int = 0) -> int:
    """Seed ``i`` of this run, 1000·run + i: two runs share none.

    Raises:
        ValueError: i outside 0…999.
    """
    door(i=i)
    if i >= 1000:
        raise ValueError(f"i={i}: a run has seeds 0 to 999")
    return 1000 * run() + i


def keep() -> bool:
    """``SAEUTILS_KEEP=1``: figures and ledger go to ``figures/``, to be committed; else to the cache.

    Raises:
        ValueError: set to something else than 0 or 1.
    """
    return _variable("SAEUTILS_KEEP", "0 or 1", ("0", "1").__contains__) == "1"


def rehearsal(scale: str) -> bool:
    """True where results are not to be judged or kept: at ``smoke``, and under a cap."""
    return scale == "smoke" or bool(caps())


def _capped(value, bound: int):
    """At most ``bound``; of a list its first ones."""
    return value[:bound] if isinstance(value, list) else min(value, bound)


def choose(scale: str, table: dict[str, dict]) -> tuple[SimpleNamespace, pd.DataFrame]:
    """The settings of the scale that runs, and the table of all scales to show (settings × scales).

    A scale gives only what differs from its parent: ``laptop`` from ``smoke``, ``overnight`` and ``colab`` from ``laptop``,
    ``paper`` from ``colab``; the table shows ″ for what is as in the column to the left. A setting ``why`` says what the
    differences are for. Settings named in :func:`saeutils.kernels.jobs.caps` are cut to their bound.

    Raises:
        ValueError: a scale that is none, in the table or in a variable.
    """
    name = current(scale)
    if not isinstance(table, dict) or not table:
        raise ValueError(f"table={table!r}: expected the settings of each scale, {', '.join(SCALES)}")
    if unknown := sorted(set(table) - set(SCALES)):
        raise ValueError(f"the table has scales {unknown}: one of {', '.join(SCALES)}")
    filled, shown, left = {}, {}, {}
    for s, parent in PARENTS.items():
        own = table.get(s, {})
        filled[s] = {**filled.get(parent, {}), **{k: v for k, v in own.items() if k != "why"}}
        shown[s] = {"why": own.get("why", ""), **{k: "″" if k in left and left[k] == v else v for k, v in filled[s].items()}}
        left = filled[s]
    frame = pd.DataFrame(shown).fillna("").rename(columns={name: f"{name} ← runs"})
    if not any(own.get("why") for own in table.values()):
        frame = frame.drop(index="why")
    settings = {k: _capped(v, caps()[k]) if k in caps() else v for k, v in filled[name].items()}
    return SimpleNamespace(scale=name, run=run(), **settings), frame
