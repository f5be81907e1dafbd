"""Concept slots by hand: a question, what each slot says of it, sliders that set them, and what the model answers."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence

import ipywidgets as w
import numpy as np
import pandas as pd

from saeutils.kernels.door import door
from saeutils.notebook.widgets import live
from saeutils.worlds import biographies

MOST = 10.0  # of a slider, in units of a slot's mean on its own questions
TARGET = 1.0  # what a chosen target is set to at first


def swap_panel(
    people: pd.DataFrame, concepts: Sequence[str], blocks: Mapping[str, int], methods: Sequence[str],
    read: Callable[[str, int, str], np.ndarray], write: Callable[[str, int, str, np.ndarray], str],
) -> None:  # fmt: skip
    """Show the panel.

    Args:
        people: of :func:`saeutils.worlds.biographies.population`. concepts: relations, one slot each.
        blocks: label → block. methods: names that ``read`` and ``write`` know.
        read: (prompt, block, method) → how active each slot is, [concepts], 1 being its mean on its own questions.
        write: (prompt, block, method, the same after the edit) → the model's answer.

    Raises:
        ValueError: no people, concepts that people lack, no blocks or methods.
    """
    door(names=list(concepts), jobs=blocks)
    if missing := sorted(set(concepts) - set(people)):
        raise ValueError(f"people have no {', '.join(missing)}: they have {', '.join(people.columns[2:])}")
    if not len(people) or not len(methods):
        raise ValueError(f"{len(people)} people and {len(methods)} methods: at least one of each")
    panel = _Swaps(people.reset_index(drop=True), list(concepts), blocks, methods, read, write)
    live.show(panel.worker, panel.board(), panel.answer, lambda: panel.shown.value)


class _Swaps:
    def __init__(self, people, concepts, blocks, methods, read, write):
        self.people, self.concepts, self.read, self.write = people, concepts, read, write
        wide = {"style": {"description_width": "70px"}, "layout": w.Layout(width="340px")}
        asked = [(f"{r}: {q.format(s='…', p='…')}", (r, q)) for r in concepts for q in biographies.lists()["relations"][r]["questions"]]
        self.person = w.Dropdown(options=[(name, i) for i, name in enumerate(people["name"])], description="person", **wide)
        self.question = w.Dropdown(options=asked, index=5, description="question", **wide)
        self.text = w.Text(description="or type", continuous_update=False, **wide)
        self.block = w.Dropdown(options=list(blocks.items()), description="block", **wide)
        self.method = w.Dropdown(options=list(methods), description="method", **wide)
        self.target = w.Dropdown(options=["none", *concepts], index=3, description="target", **wide)
        slim = {"style": {"description_width": "90px"}, "layout": w.Layout(width="330px"), "continuous_update": False}
        self.sliders = [w.FloatSlider(min=0, max=MOST, step=0.1, description=name, **slim) for name in concepts]
        self.shown = w.HTML(layout=w.Layout(min_height="250px", flex="1 1 420px"))
        self.worker = live.Worker({"answer": [self.shown]})
        self.filling = False  # sliders are being set: nobody has moved them
        self._ask()
        for control in (self.person, self.question):
            control.observe(lambda _: self._ask(), "value")
        for control in (self.text, self.block, self.method, self.target):
            control.observe(lambda _: self.filling or self.worker.ask("answer", self.answer), "value")
        for slider in self.sliders:
            slider.observe(lambda _: self.filling or self.worker.ask("answer", self.moved, live.DEBOUNCE), "value")

    def board(self) -> w.Widget:
        controls = [self.person, self.question, self.text, self.block, self.method, self.target]
        left = w.VBox([*controls, *self.sliders], layout=w.Layout(flex="0 0 350px"))
        return self.worker.board(left, self.shown)

    def _ask(self) -> None:
        """Write the chosen question into the box, which asks it."""
        person, (_, question) = self.people.iloc[self.person.value], self.question.value
        self.text.value = question.format(s=person["name"], p=person["pronoun"])

    @property
    def prompt(self) -> str:
        if not self.text.value.strip():
            raise ValueError("type a question, or choose one")
        return biographies.PROMPT.format(self.text.value.strip())

    def answer(self, turn: live.Turn) -> None:
        """Set the sliders as the target asks, then show."""
        before = self.read(self.prompt, self.block.value, self.method.value)
        after = before.copy()
        if self.target.value != "none":
            after[int(before.argmax())] = 0.0
            after[self.concepts.index(self.target.value)] = TARGET
        self.filling = True
        for slider, value in zip(self.sliders, after):
            slider.value = float(np.clip(value, 0, MOST))
        self.filling = False
        self.show(turn, before, after)

    def moved(self, turn: live.Turn) -> None:
        """Show with the sliders as they stand."""
        self.show(turn, self.read(self.prompt, self.block.value, self.method.value), np.array([s.value for s in self.sliders]))

    def show(self, turn: live.Turn, before: np.ndarray, after: np.ndarray) -> None:
        at = self.prompt, self.block.value, self.method.value
        turn.check()
        plain = self.write(*at, before)
        turn.check()
        made = self.write(*at, after)
        rows = "".join(
            f"<tr><td style='text-align:left'>{html.escape(name)}</td><td>{_bar(old, '#9db4c8')}</td><td>{_bar(new, '#d55e00')}</td></tr>"
            for name, old, new in zip(self.concepts, before, after)
        )
        head = "<tr><th></th><th style='text-align:left'>before</th><th style='text-align:left'>after</th></tr>"
        self.shown.value = f"<p><b>answer:</b> {self._judged(plain)}</p><p><b>after the edit:</b> {self._judged(made)}</p><table>{head}{rows}</table>"

    def _judged(self, made: str) -> str:
        """An answer and whose it is: ✓ and the relation of this person, ✗ where it is none of theirs."""
        person = self.people.iloc[self.person.value]
        fits = [r for r in self.people.columns[2:] if person[r] == made]
        return f"{html.escape(made) or '(nothing)'} {'✓ ' + ' and '.join(fits) if fits else '✗ nothing of this person'}"


def _bar(value: float, colour: str) -> str:
    """A number with a bar as long as it is, cut at the slider's end."""
    width = 100 * min(max(float(value), 0.0), MOST) / MOST
    return f"<div style='width:130px;text-align:left'><div style='background:{colour};width:{width:.0f}px;height:8px'></div>{value:.1f}</div>"
