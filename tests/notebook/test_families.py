"""The panel of parents and children: found by word, counted, refused where tables do not fit."""

import numpy as np
import pytest
from scipy import sparse

from saeutils.analysis.features import LatentTable
from saeutils.notebook.widgets import families
from saeutils.notebook.widgets.live import Turn


class Tokenizer:
    """Five words."""

    def decode(self, ids):
        return " ".join(self.convert_ids_to_tokens(ids))

    def convert_ids_to_tokens(self, ids):
        return [("▁dog", "▁cat", "犬", "▁runs", "<b>")[i] for i in ids]


TOKEN = np.array([0, 3, 1, 3, 2, 4] * 10)


def table(latents: list[list[int]]) -> LatentTable:
    """Latents that fire on these words."""
    acts = np.stack([np.isin(TOKEN, words) * 1.0 for words in latents], axis=1)
    return LatentTable(sparse.csc_array(acts), np.repeat(np.arange(20), 3), TOKEN, 20)


@pytest.fixture
def panel():
    narrow, wide = table([[0, 1], [3], [2], [4]]), table([[0], [1], [3], [2]])
    found = families._Families(narrow, wide, {0: [0, 1], 1: [2], 2: [3], 3: []}, Tokenizer())
    found.find(Turn(found.find, 0))
    return found


def ask(panel, word: str, only: bool = False) -> list[int]:
    panel.only.value, panel.word.value = only, word
    panel.worker.ask("list", panel.find)
    panel.worker.wait(10)
    return [parent for _, parent in panel.listed.options]


def test_the_divided_come_first_and_words_find_parents(panel):
    assert [parent for _, parent in panel.listed.options] == [0] and panel.listed.label == "0 · cat · 2 children" and "child 1, wide" in panel.texts.value
    assert ask(panel, "") == [0, 1, 2, 3]
    assert ask(panel, "Dog") == [0] and ask(panel, "犬") == [2] and ask(panel, "run") == [1]
    assert ask(panel, "dog", only=True) == [0]
    panel.only.value = False
    panel.worker.wait(10)
    panel.listed.value = 0
    panel.worker.wait(10)
    assert "latent 0, narrow" in panel.texts.value


@pytest.mark.parametrize("word", ["zebra", "x" * 10_000, "😀", "<script>"])
def test_what_no_latent_knows_is_a_sentence(panel, word):
    before = list(panel.listed.options)
    assert ask(panel, "   ", only=True) == [0]
    ask(panel, word)
    assert "no latent here fires on" in panel.worker.status.value and "<script>" not in panel.worker.status.value
    assert panel.listed.options == tuple(before)


def test_texts_are_escaped(panel):
    assert ask(panel, "<b>") == [3]
    assert "&lt;b&gt;" in panel.texts.value


def test_tables_that_do_not_fit_are_refused():
    narrow, wide = table([[0]]), table([[0]])
    other = LatentTable(wide.acts, wide.doc, wide.token[::-1].copy(), 20)
    with pytest.raises(ValueError, match="children is empty"):
        families.family_panel(narrow, wide, {}, Tokenizer())
    with pytest.raises(ValueError, match="the two tables are of different texts"):
        families.family_panel(narrow, other, {0: []}, Tokenizer())
