"""The panel that trains an SAE again: what it shows is what the controls say, a newer run wins, errors are a sentence."""

import time

import pytest
import torch

from saeutils.notebook.widgets import retrain
from saeutils.notebook.widgets.live import Turn


@pytest.fixture
def rows():
    return torch.randn(600, 16, generator=torch.Generator().manual_seed(0)) * 4


def test_runs_are_drawn_over_each_other_and_named_by_their_controls(rows, monkeypatch):
    monkeypatch.setattr(retrain, "STEPS", 20)
    panel = retrain._Retrain(rows, rows[:100], 2.0, 0.1)
    panel.train(Turn(panel.train, 0))
    panel.l1.value = 10**0.5
    panel.width.value = 1
    panel.dead.value = "aux_k"
    panel.worker.wait(60)
    assert list(panel.runs) == ["L1 2, 2 × d, none", "L1 3.2, 1 × d, aux_k"] and panel.worker.status.value.count("…") == 0
    assert panel.drawn.value.count("<tr>") == 3 and "data:image/png" in panel.drawn.value
    first = panel.runs["L1 2, 2 × d, none"][0]["loss"].tolist()
    panel.train(Turn(panel.train, 0))  # the same again: the same run, not another
    assert len(panel.runs) == 2 and panel.runs["L1 2, 2 × d, none"][0]["loss"].tolist() == first


def test_a_run_that_is_replaced_stops(rows, monkeypatch):
    monkeypatch.setattr(retrain, "STEPS", 100_000)
    panel = retrain._Retrain(rows, rows[:100], 2.0, 0.1)
    panel.worker.ask("runs", panel.train)
    while "step" not in panel.worker.status.value:
        time.sleep(0.01)
    began = time.monotonic()
    panel.worker.stop()
    panel.worker.wait(10)
    assert time.monotonic() - began < 2 and not panel.runs and "stopped" in panel.worker.status.value


def test_what_cannot_be_trained_is_a_sentence(rows):
    panel = retrain._Retrain(rows * float("nan"), rows[:100], 2.0, 0.1)
    panel.worker.ask("runs", panel.train)
    panel.worker.wait(60)
    assert "NaN or inf" in panel.worker.status.value and "#b00020" in panel.worker.status.value
    with pytest.raises(ValueError, match="x has 100 rows, fewer than one batch of 256"):
        retrain.retrain_panel(rows[:100], rows)
