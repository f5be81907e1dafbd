"""Caps of a rehearsal."""

import os
import re


def caps() -> dict[str, int]:
    """``$SAEUTILS_CAP``, such as ``tokens=4000,steps=8``: upper bounds for a rehearsal of the larger scales.

    Raises:
        ValueError: it is set and is not such a list (a blank or a typo would switch a cap off without a word).
    """
    found = {}
    for part in os.environ.get("SAEUTILS_CAP", "").split(",") if "SAEUTILS_CAP" in os.environ else []:
        if not (match := re.fullmatch(r"([a-z_0-9]+)=(\d+)", part)):
            raise ValueError(f"SAEUTILS_CAP has {part!r}: write name=number,name=number without blanks, or unset it")
        found[match[1]] = int(match[2])
    return found
