"""The panel of made-up mixtures: it runs what the controls say, draws what comes back, and errors are a sentence."""

import numpy as np
import pytest

from saeutils.notebook.widgets import recovery
from saeutils.notebook.widgets.live import Turn


def run(said, look):
    look(1)
    return recovery.Recovery(np.linspace(0.5, 1, said["features"]), np.full(said["latents"], 0.02), [0.01], [(0, 0.0), (1, 0.2)])


@pytest.fixture
def panel():
    return recovery._Recovery(run, ["GBA", "TopK"], ["even"])


def test_a_run_takes_the_controls_and_is_drawn(panel):
    panel.train(Turn(panel.train, 0))
    assert "21% of 64 features" not in panel.drawn.value and "20% of 64 features recovered" in panel.drawn.value
    assert "4.8 latents active on a row, 0% never" in panel.drawn.value and "data:image/png" in panel.drawn.value
    panel.controls["features"].value = 32
    panel.worker.wait(30)
    assert "of 32 features" in panel.drawn.value


@pytest.mark.parametrize("moved, said", [
    ({"lowest": 0.5}, "the lowest target is above the highest"),
    ({"method": "TopK", "latents": 40, "k": 50}, "k = 50 of 40 latents"),
])  # fmt: skip
def test_what_cannot_be_run_is_a_sentence(panel, moved, said):
    for name, value in moved.items():
        panel.controls[name].value = value
    panel.worker.wait(30)
    assert said in panel.worker.status.value and "#b00020" in panel.worker.status.value


def test_nothing_to_choose_from_is_refused():
    with pytest.raises(ValueError, match="at least one method and one law"):
        recovery.recovery_panel(run, [], ["even"])
