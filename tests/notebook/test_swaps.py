"""The panel of slots: sliders follow the target, answers are ticked, one's own question is asked, refusals."""

import numpy as np
import pytest

from saeutils.notebook.widgets import swaps
from saeutils.notebook.widgets.live import Turn
from saeutils.worlds import biographies

PEOPLE = biographies.population(3)
CONCEPTS = biographies.relations()[:6]


def read(prompt: str, block: int, method: str) -> np.ndarray:
    return np.eye(6)[1] if "birth" in prompt or "born" in prompt else np.eye(6)[2]


def write(prompt: str, block: int, method: str, after: np.ndarray) -> str:
    return PEOPLE[CONCEPTS[int(after.argmax())]].iloc[0] if "?" in prompt else "<b>none</b>"


@pytest.fixture
def panel():
    found = swaps._Swaps(PEOPLE, CONCEPTS, {"1": 1}, ["slot"], read, write)
    found.answer(Turn(found.answer, 0))
    return found


def test_a_target_sets_the_sliders_and_the_answer_is_ticked(panel):
    panel.target.value = "major"
    panel.worker.wait(10)
    assert [s.value for s in panel.sliders] == [0, 0, 0, swaps.TARGET, 0, 0]
    assert f"{PEOPLE['major'].iloc[0]} ✓ major" in panel.shown.value and f"{PEOPLE['birth city'].iloc[0]} ✓ birth city" in panel.shown.value
    panel.target.value = "none"
    panel.worker.wait(10)
    assert [s.value for s in panel.sliders] == [0, 1, 0, 0, 0, 0]
    panel.sliders[4].value = 3.0
    panel.worker.wait(10)
    assert f"{PEOPLE['employer'].iloc[0]} ✓ employer" in panel.shown.value


def test_questions_are_chosen_or_typed(panel):
    panel.question.value = panel.question.options[12][1]
    panel.worker.wait(10)
    assert PEOPLE["name"].iloc[0] in panel.text.value and panel.sliders[1].value == 0
    panel.text.value = "Tell me about the weather."
    panel.worker.wait(10)
    assert "&lt;b&gt;none&lt;/b&gt; ✗ nothing of this person" in panel.shown.value
    panel.text.value = " "
    panel.worker.wait(10)
    assert "type a question" in panel.worker.status.value


def test_what_does_not_fit_is_refused():
    for people, concepts, blocks, methods, message in (
        (PEOPLE, ["birth city", "shoe size"], {"1": 1}, ["slot"], "people have no shoe size"),
        (PEOPLE[:0], CONCEPTS, {"1": 1}, ["slot"], "0 people and 1 methods"), (PEOPLE, CONCEPTS, {}, ["slot"], "expected names and what they stand for"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            swaps.swap_panel(people, concepts, blocks, methods, read, write)
