"""The panel of pairs: orders and fates, both sides' texts, refusals."""

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from test_families import TOKEN, Tokenizer

from saeutils.analysis.features import LatentTable
from saeutils.notebook.widgets import pairs
from saeutils.notebook.widgets.live import Turn


def table(words: list[int]) -> LatentTable:
    acts = np.stack([(word == TOKEN) * 1.0 for word in words], axis=1)
    return LatentTable(sparse.csc_array(acts), np.repeat(np.arange(20), 3), TOKEN, 20)


ROWS = pd.DataFrame(
    {"latent": [0, 1, 2], "partner": [0, 2, 1], "correlation": [0.9, 0.1, 0.75], "cosine": [0.9, 0.95, 0.3], "fate": ["found", "not the same", "kept"]}
)


@pytest.fixture
def panel():
    found = pairs._Pairs({"plain": ROWS, "mirror": ROWS[:1]}, dict.fromkeys(("plain", "mirror"), (table([0, 1, 4]), table([0, 2, 3]))), Tokenizer())
    found.find(Turn(found.find, 0))
    return found


def listed(panel, **controls) -> list[int]:
    for name, value in controls.items():
        getattr(panel, name).value = value
    panel.worker.wait(10)
    return [index for _, index in panel.listed.options]


def test_pairs_come_in_the_order_asked_for(panel):
    assert listed(panel) == [1, 0, 2]
    assert listed(panel, order="alike in activation") == [0, 2, 1] and panel.listed.label == "0 – 0 · 0.90 · found"
    assert listed(panel, order="unlike in activation") == [1, 2, 0]
    assert "correlate at 0.10, decoder rows at 0.95: not the same" in panel.texts.value and "side B, latent 2" in panel.texts.value
    assert listed(panel, fate="kept") == [2] and "&lt;b&gt;" in panel.texts.value
    assert listed(panel, fate="all", arm="mirror") == [0]


def test_what_an_arm_lacks_is_a_sentence(panel):
    before = panel.listed.options
    listed(panel, arm="mirror", fate="kept")
    assert "no latent of &#x27;mirror&#x27; is kept" in panel.worker.status.value and panel.listed.options == before


def test_what_does_not_fit_is_refused():
    tables = {"plain": (table([0]), table([0]))}
    for given, message in (({}, "both need the same arms"), ({"plain": ROWS.drop(columns="fate")}, "lack fate"), ({"plain": ROWS[:0]}, "is empty: no latent fires")):
        with pytest.raises(ValueError, match=message):
            pairs.pairs_panel(given, tables, Tokenizer())
