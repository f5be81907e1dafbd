"""Latents of a narrow dictionary, found by the words they fire on, each above its children in a wider one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ipywidgets as w
import numpy as np
from scipy import sparse

from saeutils.analysis import features, language
from saeutils.kernels.door import door
from saeutils.notebook.widgets import live
from saeutils.notebook.widgets.chooser import Chooser

LISTED, TEXTS, AROUND = 200, 4, 12  # parents in the list, texts a latent, tokens on either side of a peak


def family_panel(
    narrow: features.LatentTable, wide: features.LatentTable, children: Mapping[int, Sequence[int]], tokenizer
) -> None:
    """Show the panel: ``children`` holds for each latent of ``narrow`` that is to be found those in ``wide``, perhaps none.

    Raises:
        ValueError: no latents, or the tables are of different texts.
    """
    door(table=narrow, tokenizer=tokenizer)
    door(table=wide)
    if not children:
        raise ValueError("children is empty: there is no latent to show")
    if not np.array_equal(narrow.token, wide.token):
        raise ValueError("the two tables are of different texts: make both from the same activations")
    panel = _Families(narrow, wide, children, tokenizer)
    live.show(panel.worker, panel.board([panel.word, panel.only]), panel.find, lambda: f"<b>{panel.listed.label}</b><br>{panel.texts.value}")


class _Families(Chooser):
    def __init__(self, narrow, wide, children, tokenizer):
        super().__init__()
        self.narrow, self.wide, self.tokenizer = narrow, wide, tokenizer
        self.children = {int(parent): list(found) for parent, found in children.items()}
        self.words, self.counts = _words(narrow, tokenizer)
        wider = {"style": {"description_width": "60px"}, "layout": w.Layout(width="300px")}
        self.word = w.Text(placeholder="dog, 犬 … or nothing: all", description="word", **wider)
        divided = any(len(found) > 1 for found in self.children.values())
        self.only = w.Checkbox(value=divided, description="only with several children", indent=False)
        self.find_again([self.word, self.only], live.DEBOUNCE)

    def find(self, turn: live.Turn) -> None:
        """Parents that fire on the word, those first that fire on little else; without a word the most divided first."""
        wanted = self.word.value.strip().lower()[:100]
        divided = [p for p, found in self.children.items() if len(found) > 1]
        parents = divided if self.only.value and divided else list(self.children)
        share = self._share(wanted)
        ranked = sorted(parents, key=lambda p: (-share[p], -len(self.children[p]), p))
        found = [p for p in ranked if share[p] > 0 or not wanted][:LISTED]
        turn.check()
        if not found and wanted:
            raise ValueError(f"no latent here fires on {wanted!r}" + ", or only undivided ones do" * self.only.value)
        self.fill([(self._label(p), p) for p in found], turn)

    def _share(self, wanted: str) -> np.ndarray:
        """Of every latent's firings the share on tokens that are the word, or where there are none, that hold it."""
        same = np.array([word == wanted for word in self.words])
        columns = np.flatnonzero(same if same.any() else [wanted in word for word in self.words])
        total = np.maximum(self.counts.sum(axis=1), 1)
        return np.asarray(self.counts[:, columns].sum(axis=1)).ravel() / total if wanted else np.zeros(len(total))

    def _label(self, parent: int) -> str:
        most = self.words[int(self.counts[[parent]].toarray().argmax())]
        several = {1: "1 child"}.get(n := len(self.children[parent]), f"{n} children")
        return f"{parent} · {most or '␣'} · {several}"

    def read(self, turn: live.Turn) -> None:
        """The texts of the chosen parent, and of its children."""
        parent = self.listed.value
        shown = [f"<b>latent {parent}, narrow</b>", features.shaded(self.narrow, self.tokenizer, parent, n=TEXTS, around=AROUND)]
        for child in self.children[parent]:
            turn.check()
            shown.append(f"<b>child {child}, wide</b>{features.shaded(self.wide, self.tokenizer, child, n=TEXTS, around=AROUND)}")
        self.texts.value = "<br>".join(shown)


def _words(table: features.LatentTable, tokenizer) -> tuple[list[str], sparse.csr_array]:
    """Words of the texts, and how often each latent fires on each of them, [latents, words]."""
    ids, word = np.unique(table.token, return_inverse=True)
    names = [language.pieces([token])[0][0].strip().lower() for token in tokenizer.convert_ids_to_tokens(ids.tolist())]
    words = sorted(set(names))
    place = {name: i for i, name in enumerate(words)}
    of_token = np.array([place[name] for name in names])[word]  # [tokens]
    fired = table.acts.tocoo()
    row, latent = fired.coords
    counts = sparse.coo_array((np.ones(len(row)), (latent, of_token[row])), shape=(table.acts.shape[1], len(words)))
    return words, counts.tocsr()
