"""The explorer's controls and where they stand: no logic. Core ipywidgets common to versions 7.7 and 8."""

from __future__ import annotations

import ipywidgets as w

from saeutils.notebook.widgets import live
from saeutils.notebook.widgets.writing import MODES

SHOWN = 64  # tokens of a sentence that get a button
PRESETS = {"turns": 0.5, "too strong": 1.5}
WRAPPED = {"flex_flow": "row wrap", "width": "100%"}


def _box(height: int, **more) -> w.Layout:
    """A fixed height, so that nothing below jumps."""
    return w.Layout(height=f"{height}px", overflow="auto", border="1px solid #ddd", padding="4px", **more)


def _button(text: str = "", hidden: bool = False, **more) -> w.Button:
    return w.Button(description=text, layout=w.Layout(width="auto", margin="1px", display="none" if hidden else "", **more))


class Board:
    """Three panes, read, card and write, as widgets; :class:`saeutils.notebook.explorer.Explorer` gives them life."""

    def __init__(self):
        full = {"width": "98%"}
        self.sentence = w.Text(placeholder="a sentence", layout=w.Layout(**full))
        self.buttons = [_button(hidden=True) for _ in range(SHOWN)]
        self.everywhere = _button("all tokens", align_self="flex-start")
        self.strongest = w.Select(options=[], rows=10, layout=w.Layout(height="190px", **full))
        self.search = w.Text(placeholder="a word that a latent promotes, Enter", continuous_update=False, layout=w.Layout(**full))
        self.number = w.IntText(layout=w.Layout(width="90px"))
        self.back, self.use = _button("◀ back"), _button("steer with this")
        self.near = [_button(hidden=True) for _ in range(4)]
        self.card = w.HTML(layout=_box(330, flex="1 1 340px"))
        self.prompt = w.Text(placeholder="a prompt", layout=w.Layout(**full))
        self.slots = [
            (
                w.Dropdown(options=["off", *MODES], layout=w.Layout(width="105px")),
                w.IntText(layout=w.Layout(width="80px")),
                w.FloatSlider(min=-2, max=2, step=0.05, value=0.5, layout=w.Layout(flex="1 1 160px")),
            )
            for _ in range(4)
        ]
        self.heat = w.FloatSlider(min=0, max=1.5, step=0.1, description="temperature", layout=w.Layout(width="310px"), style={"description_width": "90px"})
        self.acts = {name: _button(name) for name in ("another sample", *PRESETS, "undo", "reset", "stop")}
        self.text = w.HTML(layout=_box(210))
        self.meters = w.HTML(layout=w.Layout(height="140px", flex="1 1 360px"))
        self.results = w.Select(options=[], rows=4, layout=w.Layout(height="100px", flex="1 1 300px"))
        self.worker = live.Worker({"read": [self.strongest, *self.buttons], "card": [self.card], "write": [self.text, self.meters]})

    def panel(self) -> w.Widget:
        """All of it, from top to bottom; rows wrap where the notebook is narrow."""
        row = w.Layout(**WRAPPED)
        look = [self.everywhere, self.strongest, self.search, w.HBox([self.number, self.back, self.use]), w.HBox(self.near, layout=row)]
        return w.VBox([
            w.HTML("<b>Read</b>: type a sentence, click a token, click a latent"),
            self.sentence,
            w.HBox(self.buttons, layout=w.Layout(height="96px", overflow="auto", align_content="flex-start", **WRAPPED)),
            w.HBox([w.VBox(look, layout=w.Layout(flex="1 1 320px")), self.card], layout=row),
            self.worker.status,
            w.HTML("<b>Steer</b>: add in units of the residual stream's spread, clamp in units of a latent's large activation"),
            self.prompt,
            w.HBox([w.HBox(list(slot), layout=w.Layout(flex="1 1 380px")) for slot in self.slots], layout=row),
            w.HBox([self.heat, *self.acts.values()], layout=row),
            self.text,
            w.HBox([self.meters, self.results], layout=row),
        ])  # fmt: skip
