"""One line to look into any SAELens SAE on any language model: sentence → tokens → latents, a latent's card, steering.

explorer.show(lm, sae)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import ipywidgets as w
import numpy as np
import torch

from saeutils.analysis import features, index, language
from saeutils.kernels.door import require_latents
from saeutils.lm.tokens import begin, encode
from saeutils.notebook.widgets import drawing, live, writing
from saeutils.notebook.widgets.board import PRESETS, SHOWN, Board
from saeutils.notebook.widgets.writing import Setting

if TYPE_CHECKING:  # late: together they take seconds to import
    from sae_lens.saes.sae import SAE
    from transformer_lens.model_bridge import TransformerBridge

SENTENCE = "She smiled and thanked him, but he was rude and cruel."


def show(
    lm: TransformerBridge, sae: SAE, *, hook: str | None = None, texts: Sequence[str] | None = None,
    latents: Sequence[int] = (), sentence: str = SENTENCE, prompt: str = "he is such a", strength: float = 0.5,
) -> None:  # fmt: skip
    """Show the explorer, and work its first state out in it; below stands a static rendering until it is used.

    Args:
        hook: where the SAE reads; by default what its card says.
        texts: those that latents are looked up in; by default embedded ones. Indexed once and kept.
        latents: up to four that steer at first; by default the strongest of the sentence's last token.
        strength: of each of them, in units of the residual's spread.

    Raises:
        ValueError: an SAE of another hook point or width than the language model has; no texts.
    """
    explorer = Explorer(lm, sae, hook, index.some_texts() if texts is None else texts)
    live.show(explorer.worker, explorer.panel(), lambda _: explorer.begin(latents, sentence, prompt, strength), explorer.static)


class Explorer(Board):
    """The panes' widgets, what was read and written, and the worker that does both: see :func:`show`."""

    def __init__(self, lm: TransformerBridge, sae: SAE, hook: str | None, texts: Sequence[str]):
        super().__init__()
        self.lm, self.sae, self.hook = lm, sae, _fitting(lm, sae, hook)
        self.table, self.unit = index.indexed(lm, sae, self.hook, texts)
        self.fired = np.flatnonzero(np.diff(self.table.acts.indptr))
        self.norms = sae.W_dec.detach().float().norm(dim=1).clamp_min(1e-12)
        self.labels: dict[int, str] = {}
        self.latent, self.position, self.f, self.pieces = 0, None, torch.zeros(0, sae.cfg.d_sae), []
        self.visited, self.past, self.at, self.plain, self.quiet = [], [], 0, {}, False
        self._listen()

    def _listen(self) -> None:
        def on(widget: w.Widget, act) -> None:
            widget.observe(lambda change: None if self.quiet else act(change["new"]), "value")

        on(self.sentence, lambda _: self.worker.ask("read", self.read, live.DEBOUNCE))
        for i, button in enumerate(self.buttons):
            button.on_click(lambda _, i=i: self.choose(i))
        self.everywhere.on_click(lambda _: self.choose(None))
        for listed in (self.strongest, self.number):
            on(listed, lambda latent: latent is not None and self.open(int(latent)))
        on(self.search, lambda word: self.worker.ask("read", lambda turn: self.find(word)))
        self.back.on_click(lambda _: len(self.visited) > 1 and self.open(self.visited[-2], back=True))
        for button in self.near:
            button.on_click(lambda b: self.open(int(b.description.split()[0])))
        self.use.on_click(lambda _: self.steer_with(self.latent))
        for control in (self.prompt, self.heat, *(part for slot in self.slots for part in slot)):
            on(control, lambda _: self.moved())
        on(self.results, lambda number: number is not None and self.again(number))
        self.acts["another sample"].on_click(lambda _: self.change(seed=self.seed + 1))
        for name, strength in PRESETS.items():
            self.acts[name].on_click(lambda _, by=strength: self.change(strength=by))
        self.acts["undo"].on_click(lambda _: self.undo())
        self.acts["reset"].on_click(lambda _: self.restore(self.first))
        self.acts["stop"].on_click(self.worker.stop)

    @contextmanager
    def _set(self):
        """Values set in the block are ours, not the reader's: nobody answers to them."""
        self.quiet = True
        try:
            yield
        finally:
            self.quiet = False

    # --- reading

    def begin(self, latents: Sequence[int], sentence: str, prompt: str, strength: float) -> None:
        """The first state."""
        with self._set():
            self.sentence.value = sentence
        self.seed = 0
        self.worker.ask("read", self.read)
        self.worker.wait()
        found = [value for _, value in self.strongest.options]
        chosen = [*latents][:4] or found[:1]
        self.first = Setting(prompt, tuple(("add", int(latent), strength) for latent in chosen))
        self.open(chosen[0] if chosen else 0)
        self.restore(self.first)
        self.worker.wait()

    @torch.no_grad()
    def read(self, turn: live.Turn) -> None:
        """Sentence → tokens → the latents of each of them."""
        if not self.sentence.value.strip():
            raise ValueError("type a sentence first")
        bos, whole = len(begin(self.lm)), encode(self.lm, self.sentence.value)  # [1, position]
        ids, n = whole[:, : SHOWN + bos], whole.shape[1] - bos
        x = features.residual(self.lm, self.hook, ids)[0, bos:]  # [tokens, d]
        turn.check()
        self.f = self.sae.encode(x.to(self.sae.device, self.sae.dtype)).float().cpu()  # [tokens, d_sae]
        self.pieces, _ = language.pieces(self.lm.tokenizer.convert_ids_to_tokens(ids[0, bos:].tolist()))
        self.position = len(self.pieces) - 1
        self._list()
        if n > SHOWN:
            self.worker.say(f"the first {SHOWN} of {n:,} tokens are read")

    def choose(self, position: int | None) -> None:
        """List the latents of one token, or of all."""
        self.position = position
        self.worker.ask("read", lambda turn: self._list())

    def _list(self) -> None:
        values = self.f.amax(0) if self.position is None else self.f[min(self.position, len(self.f) - 1)]
        top, numbers = values.topk(min(10, len(values)))
        self._shade()
        self._options([(i, v) for i, v in zip(numbers.tolist(), top.tolist()) if v > 0])

    def _options(self, found: Sequence[tuple[int, float]]) -> None:
        for named in ([], [i for i, _ in found]):  # their numbers at once, their words a moment later
            self._label(named)
            with self._set():
                self.strongest.options = [(f"{i} · {self.labels.get(i, '…')} · {v:.3g}", i) for i, v in found]
                self.strongest.value = None

    def _shade(self) -> None:
        values = self.f[:, self.latent].numpy()  # [tokens]
        largest = max(float(values.max(initial=0.0)), 1e-9)
        for i, button in enumerate(self.buttons):
            if i < len(self.pieces):
                share = float(values[i]) / largest
                button.description, button.tooltip = drawing.visible(self.pieces[i]), f"latent {self.latent}: {values[i]:.3g}"
                button.style.button_color = f"rgb(255,{round(245 - 110 * share)},{round(240 - 220 * share)})"
                button.layout.border = "2px solid #333" if i == self.position else "1px solid #ddd"
            button.layout.display = "" if i < len(self.pieces) else "none"

    @torch.no_grad()
    def _label(self, latents: Sequence[int]) -> None:
        """Names from the tokens that each latent promotes, looked up together."""
        if new := [i for i in latents if i not in self.labels]:
            best = features.promoted(self.lm, self.sae.W_dec[new]).topk(3).indices.tolist()
            self.labels |= {i: ", ".join(self.lm.tokenizer.decode([t]).strip()[:14] for t in ids) for i, ids in zip(new, best)}

    def find(self, word: str) -> None:
        """List the latents that promote a word and fire on the indexed texts."""
        ids = self.lm.tokenizer(" " + word.strip(), add_special_tokens=False)["input_ids"] if word.strip() else []
        if not ids:
            raise ValueError("type a word to search for")
        scores = features.promoting(self.lm, self.sae, ids[0])[torch.from_numpy(self.fired).long().to(self.sae.device)]
        best = scores.topk(min(10, len(scores)))
        self._options([(int(self.fired[i]), v) for i, v in zip(best.indices.tolist(), best.values.tolist())])
        if len(ids) > 1:
            parts = "·".join(self.lm.tokenizer.decode([i]) for i in ids).strip()
            self.worker.say(f"{parts} is {len(ids)} tokens: searched for the first")

    def open(self, latent: int, back: bool = False) -> None:
        """Ask for a latent's card."""
        self.worker.ask("card", lambda turn: self._open(latent, back))

    @torch.no_grad()
    def _open(self, latent: int, back: bool) -> None:
        require_latents(latent, self.sae.cfg.d_sae)
        self.latent = latent
        self.visited = self.visited[:-1] if back else [*self.visited, latent]
        rows = self.sae.W_dec.detach().float()
        cosines = (rows @ rows[latent]) / (self.norms * self.norms[latent])
        cosines, nearest = cosines.topk(min(5, len(rows)))
        self._label([latent, *nearest.tolist()])
        with self._set():
            self.number.value = latent
        for button, c, i in zip(self.near, cosines[1:].tolist(), nearest[1:].tolist()):
            button.description, button.layout.display = f"{i} · cosine {c:.2f}", ""
        self.card.value = self._card()
        self._shade()

    def _card(self) -> str:
        words = features.token_table(self.lm, self.sae.W_dec[self.latent], 10)
        page = getattr(self.sae.cfg.metadata, "neuronpedia_id", None)
        link = f"https://neuronpedia.org/{page}/{self.latent}" if page else ""
        return drawing.card(self.latent, self.labels[self.latent], self.table, self.lm.tokenizer, words.to_dict("list"), link)

    # --- steering

    def setting(self) -> Setting:
        """What the controls say."""
        slots = tuple((mode.value, int(latent.value), round(by.value, 2)) for mode, latent, by in self.slots if mode.value != "off")
        return Setting(self.prompt.value, slots, round(self.heat.value, 2), self.seed)

    def ask(self, wait: float = 0.0) -> None:
        """Ask for the text that the controls describe at this moment."""
        setting = self.setting()
        self.worker.ask("write", lambda turn: self.write(turn, setting), wait)

    def moved(self) -> None:
        """A control was moved, or a browser sent back its own rounding of what it shows already."""
        shown = self.past and self.past[self.at][0] == self.setting() and "saeutils-old" not in self.text._dom_classes
        if not shown:
            self.ask(live.DEBOUNCE)

    def steer_with(self, latent: int) -> None:
        """Put a latent into the first slot that is free, or into the last."""
        free = next((slot for slot in self.slots if slot[0].value == "off"), self.slots[-1])
        with self._set():
            free[0].value, free[1].value = "add", latent
        self.ask()

    def change(self, seed: int | None = None, strength: float | None = None) -> None:
        """Another sample (warm enough to be another one), or one strength for every slot."""
        with self._set():
            if seed is not None:
                self.seed, self.heat.value = seed, self.heat.value or 0.7
            for slot in self.slots if strength is not None else ():
                slot[2].value = strength
        self.ask()

    def undo(self) -> None:
        """Back to the result before what the controls say; the list of results stays as it is."""
        if self.past:
            self.again(self.at - 1 if self.past[self.at][0] == self.setting() else self.at)

    def again(self, number: int) -> None:
        """A result of the list, at once."""
        self.at = max(0, number)
        self.restore(*self.past[self.at])

    def restore(self, setting: Setting, text: str = "", meters: str = "") -> None:
        """Set the controls; show the result where it is known, else ask for it."""
        with self._set():
            self.prompt.value, self.heat.value, self.seed = setting.prompt, setting.temperature, setting.seed
            for slot, (mode, latent, by) in zip(self.slots, [*setting.slots, *[("off", 0, 0.5)] * 4]):
                slot[0].value, slot[1].value, slot[2].value = mode, latent, by
        self.worker.ask("write", (lambda turn: self._show(text, meters)) if text else (lambda turn: self.write(turn, setting)))

    def _show(self, text: str, meters: str) -> None:
        self.text.value, self.meters.value = text, meters

    def write(self, turn: live.Turn, setting: Setting) -> None:
        """The text before, after, and along a random direction of equal norm; then the meters, and an entry in the list."""
        writing.check(self.lm, self.sae, setting)
        given = writing.edits(self.sae, self.hook, setting, self.unit, self._typical)
        unedited = (setting.prompt, setting.temperature, setting.seed, setting.tokens)
        written = {"before": self.plain.get(unedited, "")}
        arms = {} if written["before"] else {"before": []}
        arms |= {"after": given, "random direction": writing.control(self.lm, self.hook, setting, given)} if given else {}
        for name, edits in arms.items():
            for written[name] in writing.growing(self.lm, setting, edits, turn.check):
                self.text.value = drawing.comparison(setting.prompt, written)
        self.plain[unedited] = written["before"]
        turn.check()
        self._show(drawing.comparison(setting.prompt, written), drawing.meters(writing.meters(self.lm, setting.prompt, written)))
        self.at = len(self.past)
        self.past.append((setting, self.text.value, self.meters.value))
        with self._set():
            self.results.options = [(str(past[0]), i) for i, past in reversed(list(enumerate(self.past)))]
            self.results.value = None

    def _typical(self, latent: int) -> float:
        values = self.table.of(latent)
        return float(np.quantile(values[values > 0], 0.99)) if values.any() else 1.0

    def static(self) -> str:
        """What the panes show now, without controls."""
        latents = "<br>".join(label for label, _ in self.strongest.options)
        return (
            f"<p><i>The panel as it opens; it answers once the notebook runs.</i></p>{drawing.tokens(self.pieces, self.f[:, self.latent].numpy())}"
            f"<table><tr><td style='vertical-align:top;text-align:left'><b>strongest latents</b><br>{latents}</td>"
            f"<td style='vertical-align:top;text-align:left'>{self.card.value}</td></tr></table>{self.text.value}{self.meters.value}"
        )


def _fitting(lm: TransformerBridge, sae: SAE, hook: str | None) -> str:
    """The hook point, if the SAE can read there."""
    hook = hook or sae.cfg.metadata.hook_name
    if hook not in lm.hook_dict:
        raise ValueError(f"{lm.cfg.model_name} has no hook point {hook!r}: give hook='blocks.L.hook_resid_post', L from 0 to {lm.cfg.n_layers - 1}")
    if sae.cfg.d_in != lm.cfg.d_model:
        raise ValueError(f"the SAE reads {sae.cfg.d_in} dimensions, {lm.cfg.model_name} has {lm.cfg.d_model}: an SAE of another model?")
    return hook
