"""The paper paths of notebooks 05 and on, from the first cell to the last, against the stand-in hub; a file goes to one worker."""

from pathlib import Path

import pytest

SCALE = "paper"
pytestmark = pytest.mark.rehearsal
NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))[4:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs_on_the_hub(path, rehearse):
    rehearse(path)
