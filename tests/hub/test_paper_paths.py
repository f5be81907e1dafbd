"""Every notebook's paper path, from the first cell to the last, against the stand-in hub (a file a scale: one worker each)."""

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs_on_the_hub(path, rehearse):
    rehearse(path, "paper")
