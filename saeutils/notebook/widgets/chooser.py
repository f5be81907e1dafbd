"""A list on the left, the texts of what is chosen in it on the right: what panels of latents share."""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets as w

from saeutils.notebook.widgets import live


class Chooser:
    """Subclasses give ``find(turn)``, which ends in :meth:`fill`, and ``read(turn)``, which writes ``texts`` for ``listed.value``."""

    def __init__(self):
        self.listed = w.Select(rows=12, layout=w.Layout(width="300px"))
        self.texts = w.HTML(layout=w.Layout(height="420px", overflow="auto", flex="1 1 420px"))
        self.worker = live.Worker({"list": [self.listed, self.texts], "texts": [self.texts]})
        self.filling = False  # the list is being changed: nobody has chosen anything
        self.listed.observe(lambda _: self.filling or self.worker.ask("texts", self.read), "value")

    def find_again(self, controls: Sequence[w.Widget], wait: float = 0.0) -> None:
        """Ask ``find`` whenever one of the controls changes."""
        for control in controls:
            control.observe(lambda _: self.worker.ask("list", self.find, wait), "value")

    def fill(self, entries: Sequence[tuple[str, int]], turn: live.Turn) -> None:
        """List (label, value) and show the first."""
        self.filling = True
        self.listed.options, self.listed.value = entries, entries[0][1]
        self.filling = False
        self.read(turn)

    def board(self, controls: Sequence[w.Widget]) -> w.Widget:
        left = w.VBox([*controls, self.listed], layout=w.Layout(flex="0 0 310px"))
        return self.worker.board(left, self.texts)

    def find(self, turn: live.Turn) -> None:
        raise NotImplementedError

    def read(self, turn: live.Turn) -> None:
        raise NotImplementedError
