"""A probe on few latents by hand: how many it may use, which it takes, and what each says of a sentence of one's own."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from typing import NamedTuple

import ipywidgets as w
import numpy as np
from sklearn.linear_model import LogisticRegression

from saeutils.analysis import quality
from saeutils.kernels.door import door
from saeutils.notebook.widgets import live

MOST = 20  # latents


class Task(NamedTuple):
    """Texts of two classes: ``rows``, where they stand in the table of latents; ``label`` [texts], 0 or 1; ``fit`` [texts], which train."""

    rows: slice
    label: np.ndarray
    fit: np.ndarray


def probe_panel(
    latents: Mapping[str, np.ndarray], tasks: Mapping[str, Task], encode: Callable[[str, str], np.ndarray], sentence: str
) -> None:
    """Show the panel.

    Args:
        latents: dictionary → latents averaged over the tokens of each text, [texts, latents].
        encode: (dictionary, sentence) → the same of one sentence, [latents].
        sentence: what is in the box at first.

    Raises:
        ValueError: no dictionary, no task, no sentence.
    """
    door(jobs=latents, work=encode, prompt=sentence)
    if not tasks:
        raise ValueError("no tasks: give at least one set of labelled texts")
    panel = _Probes(latents, tasks, encode, sentence)
    live.show(panel.worker, panel.board(), panel.fit, lambda: panel.shown.value)


class _Probes:
    def __init__(self, latents, tasks, encode, sentence):
        self.latents, self.tasks, self.encode = latents, tasks, encode
        wide = {"style": {"description_width": "80px"}, "layout": w.Layout(width="340px")}
        self.arm = w.Dropdown(options=list(latents), description="dictionary", **wide)
        self.task = w.Dropdown(options=list(tasks), description="classes", **wide)
        self.k = w.IntSlider(value=5, min=1, max=MOST, description="latents", continuous_update=False, **wide)
        self.text = w.Text(value=sentence, description="sentence", continuous_update=False, **wide)
        self.shown = w.HTML(layout=w.Layout(min_height="250px", flex="1 1 420px"))
        self.worker = live.Worker({"probe": [self.shown]})
        for control in (self.arm, self.task, self.text):
            control.observe(lambda _: self.worker.ask("probe", self.fit), "value")
        self.k.observe(lambda _: self.worker.ask("probe", self.fit, live.DEBOUNCE), "value")

    def board(self) -> w.Widget:
        left = w.VBox([self.arm, self.task, self.k, self.text], layout=w.Layout(flex="0 0 350px"))
        return self.worker.board(left, self.shown)

    def fit(self, turn: live.Turn) -> None:
        """The probe on the latents whose class means differ most, and what it says of the sentence."""
        if not self.text.value.strip():
            raise ValueError("type a sentence, then press Enter")
        task, arm = self.tasks[self.task.value], self.arm.value
        z, y, fit = self.latents[arm][task.rows], task.label, task.fit
        means = [z[fit & (y == label)].mean(axis=0) for label in (0, 1)]
        best = quality.most_different(z, y, fit, self.k.value)
        probe = LogisticRegression(max_iter=1000).fit(z[fit][:, best], y[fit])
        turn.check()
        own = self.encode(arm, self.text.value)[best]
        turn.check()
        score, says = probe.score(z[~fit][:, best], y[~fit]), probe.predict_proba(own[None])[0, 1]
        rows = [
            f"<tr><td>{latent}</td><td>{means[0][latent]:.3g}</td><td>{means[1][latent]:.3g}</td><td>{value:.3g}</td><td>{_bar(weight * value)}</td></tr>"
            for latent, weight, value in zip(best.tolist(), probe.coef_[0], own)
        ]
        head = "".join(f"<th>{name}</th>" for name in ("latent", "mean, class 0", "mean, class 1", "this sentence", "says"))
        self.shown.value = (
            f"<p><b>{html.escape(self.task.value)}, {html.escape(arm)}:</b> {score:.3f} of held-out texts are told right by "
            f"{len(best)} latent{'s' * (len(best) > 1)}; an untaught guess is right in {max(np.mean(y), 1 - np.mean(y)):.3f}.</p>"
            f"<p>Of “{html.escape(self.text.value)}” the probe says: class 1 with {says:.0%}.</p><table><tr>{head}</tr>{''.join(rows)}</table>"
        )


def _bar(value: float) -> str:
    """What one latent adds to the log odds: blue against, orange for class 1."""
    width = 60 * min(abs(value), 4) / 4
    return f"<div style='width:150px;text-align:left'><div style='background:{'#d55e00' if value > 0 else '#0072b2'};width:{width:.0f}px;height:8px'></div>{value:+.2f}</div>"
