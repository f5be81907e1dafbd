"""Train a small SAE again, live: its L1 coefficient, width and treatment of dead latents by hand, each run over the last."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import ipywidgets as w
import pandas as pd
import torch
from torch import Tensor

from saeutils import metrics
from saeutils.kernels.door import door
from saeutils.notebook import plots
from saeutils.notebook.widgets import drawing, live
from saeutils.saes import initializers
from saeutils.saes.standard import SparseStandardTrainingSAE, SparseStandardTrainingSAEConfig
from saeutils.training import train

STEPS, BATCH, KEPT = 240, 256, 4
WIDTHS, TREATMENTS = (1, 2, 4), ("none", "post", "anthropic", "aux_k")


def retrain_panel(x: Tensor, heldout: Tensor, *, l1: float = 2.0, gain: float = 0.1) -> None:
    """Show the panel: ReLU SAEs on rows ``x`` [n, d], measured on ``heldout`` [n, d], encoders starting at ``gain`` times the decoder.

    Raises:
        ValueError: too few rows for a batch.
    """
    door(x=x, heldout=heldout, l1=l1, gain=gain)
    if len(x) < BATCH:
        raise ValueError(f"x has {len(x):,} rows, fewer than one batch of {BATCH}")
    panel = _Retrain(x, heldout, l1, gain)
    live.show(panel.worker, panel.board(), panel.train, lambda: panel.drawn.value)


class _Retrain:
    def __init__(self, x: Tensor, heldout: Tensor, l1: float, gain: float):
        self.x, self.heldout, self.gain, self.runs = x, heldout, gain, {}
        wide = {"style": {"description_width": "80px"}, "layout": w.Layout(width="300px")}
        self.l1 = w.FloatLogSlider(value=l1, base=10, min=-1, max=1.5, step=0.05, description="L1", **wide)
        self.width = w.Dropdown(options=[(f"{n} × d", n) for n in WIDTHS], value=2, description="width", **wide)
        self.dead = w.Dropdown(options=TREATMENTS, description="dead latents", **wide)
        self.drawn = w.HTML(layout=w.Layout(height="330px", overflow="auto"))
        self.worker = live.Worker({"runs": [self.drawn]})
        for control in (self.l1, self.width, self.dead):
            control.observe(lambda _: self.worker.ask("runs", self.train, live.DEBOUNCE), "value")

    def board(self) -> w.Widget:
        stop = w.Button(description="stop")
        stop.on_click(self.worker.stop)
        controls = w.HBox([self.l1, self.width, self.dead, stop], layout=w.Layout(flex_flow="row wrap"))
        return w.VBox([controls, self.worker.status, self.drawn])

    def batches(self) -> Iterator[Tensor]:
        """Endless batches of shuffled rows, the same in every run."""
        for epoch in itertools.count():
            order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(epoch))
            yield from (self.x[rows] for rows in order[: len(order) // BATCH * BATCH].split(BATCH))

    def train(self, turn: live.Turn) -> None:
        """A run with what the controls say; the last few stay in the picture."""
        l1, width, dead = self.l1.value, self.width.value, self.dead.value
        torch.manual_seed(0)
        d = self.x.shape[1]
        sae = SparseStandardTrainingSAE(SparseStandardTrainingSAEConfig(d_in=d, d_sae=width * d, l1_coefficient=l1))
        initializers.random_decoder(sae, 0)
        sae.W_enc.data.mul_(self.gain)

        def look(step: int, *_) -> None:
            turn.check()
            self.worker.say(f"step {step} of {STEPS}")

        history = train(sae, self.batches(), STEPS, lr=1e-3, dead=dead, dead_every=60, dead_window=60, log_every=8, callback=look, progress=False)
        end = metrics.evaluate(sae, self.heldout)
        name = f"L1 {l1:.2g}, {width} × d, {dead}"
        self.runs.pop(name, None)
        self.runs[name] = history, end
        self.runs = dict(list(self.runs.items())[-KEPT:])
        self.drawn.value = self.picture()
        if end["dead"] == 1:
            self.worker.say(f"L1 {l1:.2g} has silenced every latent: take a smaller one", wrong=True)

    def picture(self) -> str:
        """Error, active and silent latents over the steps, and where each run ends on held-out rows."""
        frame = pd.concat([history.assign(run=name) for name, (history, _) in self.runs.items()])
        fig, axes = plots.panels(3, 3.3, 2.4)
        for ax, (column, label) in zip(axes, (("fvu", "FVU"), ("l0", "active latents (L0)"), ("dead", "silent lately"))):
            plots.lines(ax, frame, "step", column, "run")
            ax.set_ylabel(label)
        axes[0].set_yscale("log")
        axes[1].set_yscale("log")
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        ends = [f"<tr><td>{name}<td>{end['fvu']:.3f}<td>{end['l0']:.1f}<td>{end['dead']:.0%}" for name, (_, end) in self.runs.items()]
        table = f"<table><tr><th>run<th>FVU<th>L0<th>dead{''.join(ends)}</table>"
        return drawing.picture(fig) + table
