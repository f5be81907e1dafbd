"""The panel of probes: the library's accuracy at every k, one's own sentence, refusals."""

import numpy as np
import pytest

from saeutils.analysis import quality
from saeutils.notebook.widgets import probes
from saeutils.notebook.widgets.live import Turn

RNG = np.random.default_rng(0)
LABEL = RNG.integers(0, 2, 90)
LATENTS = np.abs(RNG.normal(size=(100, 30)))
LATENTS[10:, 7] += 2 * LABEL
TASK = probes.Task(slice(10, 100), LABEL, np.arange(90) < 60)


def encode(arm: str, sentence: str) -> np.ndarray:
    return np.eye(30)[7] * (5 if "good" in sentence else 0)


@pytest.fixture
def panel():
    found = probes._Probes({"plain": LATENTS, "<b>": LATENTS[:, ::-1]}, {"mood": TASK}, encode, "a good day")
    found.fit(Turn(found.fit, 0))
    return found


@pytest.mark.parametrize("k", [1, 3, 20])
def test_accuracy_is_the_librarys(panel, k):
    panel.k.value = k
    panel.worker.wait(10)
    score = quality.k_sparse_probing(LATENTS[TASK.rows], LABEL, TASK.fit, k)
    assert f"{score:.3f} of held-out texts are told right by {k} latent{'s' * (k > 1)}; an" in panel.shown.value


def test_a_sentence_is_told_by_its_latents(panel):
    panel.k.value = 1
    panel.worker.wait(10)
    assert "<td>7</td>" in panel.shown.value and "class 1 with 100%" in panel.shown.value and "#d55e00" in panel.shown.value
    panel.text.value = "a <i>bad</i> day"
    panel.worker.wait(10)
    assert "&lt;i&gt;bad" in panel.shown.value and "class 1 with 100%" not in panel.shown.value
    panel.arm.value = "<b>"
    panel.worker.wait(10)
    assert "&lt;b&gt;:" in panel.shown.value
    before = panel.shown.value
    panel.text.value = " "
    panel.worker.wait(10)
    assert "type a sentence" in panel.worker.status.value and panel.shown.value == before


def test_what_does_not_fit_is_refused():
    for latents, tasks, message in (({}, {"mood": TASK}, "jobs="), ({"plain": LATENTS}, {}, "no tasks: give at least one set")):
        with pytest.raises(ValueError, match=message):
            probes.probe_panel(latents, tasks, encode, "a day")
