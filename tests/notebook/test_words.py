"""The panel of a word across checkpoints: the best latent of each, texts of both languages, refusals."""

import numpy as np
import pytest
from scipy import sparse
from sklearn.metrics import f1_score
from test_families import TOKEN, Tokenizer

from saeutils.analysis.features import LatentTable
from saeutils.notebook.widgets import words
from saeutils.notebook.widgets.live import Turn

DOC = np.repeat(np.arange(20), 3)
SIDES = np.flatnonzero((TOKEN == 1) & (DOC < 10)), np.flatnonzero((TOKEN == 2) & (DOC >= 10))


def table(arm: str, step: int) -> LatentTable:
    """At step 0 one latent a word, later one for both, which also fires on a third."""
    either = (TOKEN == 1) | (TOKEN == 2)
    latents = [TOKEN == 1, TOKEN == 2, either if step else TOKEN == 3]
    return LatentTable(sparse.csc_array(np.stack(latents, axis=1) * 1.0), DOC, TOKEN, 20)


def rows(arm: str, word: str) -> tuple[np.ndarray, np.ndarray]:
    if word != "one":
        raise ValueError(f"{word!r} is in no held-out sentence: type a commoner word")
    return SIDES


@pytest.fixture
def panel():
    found = words._Words({"mirrored": [0, 250], "broken": [0]}, table, dict.fromkeys(("mirrored", "broken"), Tokenizer()), rows, "one")
    found.find(Turn(found.find, 0))
    return found


def test_f1_is_scikit_learns_in_the_weaker_language():
    told, english = table("mirrored", 250), DOC < 10
    for latent, found in enumerate(words.f1(told, *SIDES)):
        fires = told.of(latent) > 0
        one, other = (f1_score(TOKEN[part] == word, fires[part]) for word, part in ((1, english), (2, ~english)))
        assert found == pytest.approx(min(one, other))
    silent = LatentTable(sparse.csc_array((60, 2)), DOC, TOKEN, 20)
    assert words.f1(silent, *SIDES).tolist() == [0, 0]


def test_each_checkpoint_has_its_best_latent(panel):
    assert [value for _, value in panel.listed.options] == [0, 250] and panel.best[250] == 2
    label = panel.listed.options[1][0]
    assert label.startswith("step 250: latent 2 · F1 ") and label.endswith("100%, 100%")
    assert "first language" in panel.texts.value and "second language" in panel.texts.value
    panel.listed.value = 250
    panel.worker.wait(10)
    assert "one, mirrored, step 250: latent 2" in panel.texts.value and "&lt;b&gt;" in panel.texts.value
    panel.arm.value = "broken"
    panel.worker.wait(10)
    assert [value for _, value in panel.listed.options] == [0]


def test_what_is_not_there_is_a_sentence(panel):
    before = panel.listed.options
    for typed, message in (("zebra", "is in no held-out sentence: type a commoner word"), ("  ", "type a word, then press Enter")):
        panel.word.value = typed
        panel.worker.wait(10)
        assert message in panel.worker.status.value and panel.listed.options == before


def test_what_does_not_fit_is_refused():
    for steps, tokenizers in (({"mirrored": []}, {"mirrored": Tokenizer()}), ({"mirrored": [0]}, {})):
        with pytest.raises(ValueError, match=r"arms \['mirrored'\] have no checkpoints or no tokenizer"):
            words.word_panel(steps, table, tokenizers, rows, "one")
    with pytest.raises(ValueError, match="jobs="):
        words.word_panel({}, table, {}, rows, "one")
