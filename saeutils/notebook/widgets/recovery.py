"""A made-up mixture by hand: law, size, method and target rates; which features an SAE finds, how often its latents fire."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import ipywidgets as w
import numpy as np

from saeutils.kernels.door import door
from saeutils.notebook import plots
from saeutils.notebook.widgets import drawing, live

RECOVERED = 0.9  # cosine


class Recovery(NamedTuple):
    """What a run gives: best cosine of each feature [features], firing rate of each latent [latents], their targets, (step, share recovered)."""

    cosine: np.ndarray
    rate: np.ndarray
    targets: list[float]
    history: list[tuple[int, float]]


def recovery_panel(run: Callable[[Mapping, Callable[[int], None]], Recovery], methods: list[str], laws: list[str]) -> None:
    """Show the panel.

    Args:
        run: (what the controls say, ``look``) → :class:`Recovery`; it calls ``look(step)`` now and then. The controls are
            method, law, features, d, latents, highest, lowest (target rates), k, gamma, steps.
        methods, laws: names that ``run`` knows.

    Raises:
        ValueError: no method, no law.
    """
    door(work=run)
    if not methods or not laws:
        raise ValueError("name at least one method and one law that run knows")
    panel = _Recovery(run, methods, laws)
    live.show(panel.worker, panel.board(), panel.train, lambda: panel.drawn.value)


class _Recovery:
    def __init__(self, run, methods, laws):
        self.run = run
        wide = {"style": {"description_width": "110px"}, "layout": w.Layout(width="330px")}
        late = {"continuous_update": False, **wide}
        self.controls = {
            "method": w.Dropdown(options=methods, description="method", **wide),
            "law": w.Dropdown(options=laws, description="rows", **wide),
            "features": w.IntSlider(value=64, min=16, max=256, step=16, description="features", **late),
            "d": w.IntSlider(value=32, min=8, max=96, step=4, description="dimensions", **late),
            "latents": w.IntSlider(value=240, min=40, max=1000, step=40, description="latents", **late),
            "highest": w.FloatLogSlider(value=0.05, min=-2.5, max=-0.3, step=0.1, description="highest target", **late),
            "lowest": w.FloatLogSlider(value=0.005, min=-3.5, max=-0.3, step=0.1, description="lowest target", **late),
            "k": w.IntSlider(value=5, min=1, max=50, description="k of TopK", **late),
            "gamma": w.FloatLogSlider(value=0.01, min=-3, max=-0.5, step=0.1, description="γ", **late),
            "steps": w.IntSlider(value=400, min=100, max=4000, step=100, description="steps", **late),
        }
        self.drawn = w.HTML(layout=w.Layout(min_height="300px", flex="1 1 420px"))
        self.worker = live.Worker({"run": [self.drawn]})
        for control in self.controls.values():
            control.observe(lambda _: self.worker.ask("run", self.train, live.DEBOUNCE), "value")

    def board(self) -> w.Widget:
        stop = w.Button(description="stop")
        stop.on_click(self.worker.stop)
        return self.worker.board(w.VBox([*self.controls.values(), stop], layout=w.Layout(flex="0 0 345px")), self.drawn)

    def train(self, turn: live.Turn) -> None:
        """A run with what the controls say."""
        said = {name: control.value for name, control in self.controls.items()}
        if said["lowest"] > said["highest"]:
            raise ValueError("the lowest target is above the highest: move one of them")
        if said["method"].startswith("TopK") and said["k"] > said["latents"]:
            raise ValueError(f"k = {said['k']} of {said['latents']} latents: take a smaller k")

        def look(step: int) -> None:
            turn.check()
            self.worker.say(f"step {step} of {said['steps']}")

        found = self.run(said, look)
        turn.check()
        self.drawn.value = _picture(found)


def _picture(found: Recovery) -> str:
    """Best cosine of each feature, how often latents fire beside their targets, and features recovered over the steps."""
    fig, (ax, spectrum, curve) = plots.panels(3, 3.3, 2.5)
    ax.plot(np.sort(found.cosine)[::-1])
    plots.reference(ax, RECOVERED, "recovered")
    ax.set(xlabel="feature, best first", ylabel="best cosine", ylim=(0, 1.02))
    fires = found.rate[found.rate > 0]
    spectrum.hist(np.log10(fires), bins=30)
    for target in found.targets:
        spectrum.axvline(np.log10(target), ymax=0.08, color=plots.COLOURS[1])
    spectrum.set(xlabel="log₁₀ of the firing rate", ylabel="latents (ticks: targets)")
    curve.plot(*zip(*found.history))
    curve.set(xlabel="step", ylabel="features recovered", ylim=(-0.02, 1.02))
    line = (
        f"{np.mean(found.cosine >= RECOVERED):.0%} of {len(found.cosine)} features recovered (cosine of {RECOVERED:g} or more); "
        f"{found.rate.sum():.1f} latents active on a row, {np.mean(found.rate == 0):.0%} never"
    )
    return f"{drawing.picture(fig)}<p>{line}</p>"
