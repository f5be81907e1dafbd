"""A word and its counterpart across training: at which checkpoint a latent stands for both, and on which texts it fires."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence

import ipywidgets as w
import numpy as np

from saeutils.analysis import features
from saeutils.kernels.door import door
from saeutils.notebook.widgets import live
from saeutils.notebook.widgets.chooser import Chooser

TEXTS = 4  # a language


def word_panel(
    steps: Mapping[str, Sequence[int]], table: Callable[[str, int], features.LatentTable], tokenizers: Mapping[str, object],
    rows: Callable[[str, str], tuple[np.ndarray, np.ndarray]], first: str,
) -> None:  # fmt: skip
    """Show the panel.

    Args:
        steps: arm → its checkpoints. tokenizers: of each arm.
        table: (arm, step) → what the SAE of that checkpoint says of the held-out tokens.
        rows: (arm, word) → numbers of the tokens that are the word, and of those that are its counterpart; a ValueError that
            says what to type where there are none.
        first: the word in the box at the start.

    Raises:
        ValueError: no arms, an arm without checkpoints or tokenizer, no word.
    """
    door(jobs=steps, work=table, prompt=first)
    if lacking := [arm for arm, of in steps.items() if not len(of) or arm not in tokenizers]:
        raise ValueError(f"arms {lacking} have no checkpoints or no tokenizer: give at least one checkpoint, and a tokenizer each")
    panel = _Words(steps, table, tokenizers, rows, first)
    live.show(panel.worker, panel.board([panel.word, panel.arm]), panel.find, lambda: panel.texts.value)


def f1(table: features.LatentTable, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How well each latent marks a word and its counterpart by firing, [latents].

    Harmonic mean of precision and recall among the rows of one language, in the weaker of both: a latent of one language counts
    for nothing. ``first``, ``second``: numbers of the rows that are the word, and of those that are its counterpart.
    """
    fires, half = (table.acts > 0).tocsr(), table.edges[table.n_docs // 2]
    scores = []
    for part, here in ((fires[:half], first), (fires[half:], second - half)):
        scores.append(2 * part[here].sum(axis=0) / np.maximum(part.sum(axis=0) + len(here), 1))
    return np.minimum(*scores)


class _Words(Chooser):
    def __init__(self, steps, table, tokenizers, rows, first):
        super().__init__()
        self.steps, self.table, self.tokenizers, self.rows = steps, table, tokenizers, rows
        wide = {"style": {"description_width": "50px"}, "layout": w.Layout(width="300px")}
        self.word = w.Text(value=first, description="word", continuous_update=False, **wide)
        self.arm = w.Dropdown(options=list(steps), description="arm", **wide)
        self.best: dict[int, int] = {}
        self.find_again([self.word, self.arm])

    def find(self, turn: live.Turn) -> None:
        """At each checkpoint the latent that marks the word and its counterpart best."""
        if not self.word.value.strip():
            raise ValueError("type a word, then press Enter")
        arm = self.arm.value
        sides = self.rows(arm, self.word.value.strip())
        entries = []
        for step in self.steps[arm]:
            turn.check()
            table = self.table(arm, step)
            scores = f1(table, *sides)
            self.best[step] = best = int(scores.argmax())
            fires = table.of(best) > 0  # [tokens]
            recall = [fires[side].mean() for side in sides]
            entries.append((f"step {step:,}: latent {best} · F1 {scores[best]:.2f} · {recall[0]:.0%}, {recall[1]:.0%}", step))
        self.fill(entries, turn)

    def read(self, turn: live.Turn) -> None:
        """The strongest texts of the chosen checkpoint's latent, in each language."""
        arm, step = self.arm.value, self.listed.value
        latent, table = self.best[step], self.table(arm, step)
        half = table.n_docs // 2
        ranked = np.array(table.top_docs(latent, table.n_docs), dtype=int)
        parts = [f"<b>{html.escape(self.word.value)}, {arm}, step {step:,}: latent {latent}</b>"]
        for name, docs in (("first language", ranked[ranked < half]), ("second language", ranked[ranked >= half])):
            turn.check()
            shown = features.shaded(table, self.tokenizers[arm], latent, docs=docs[:TEXTS].tolist()) if len(docs) else "<i>silent</i>"
            parts.append(f"<p style='margin:6px 0 2px'>{name}</p>{shown}")
        self.texts.value = "".join(parts)
