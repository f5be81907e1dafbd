"""The panels of the first edition: each shows what the notebook has measured, and answers to its controls."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import TYPE_CHECKING

import ipywidgets as w
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from sklearn.metrics import cohen_kappa_score

from saeutils.analysis import features, language
from saeutils.kernels import files
from saeutils.kernels.door import door
from saeutils.notebook import plots

if TYPE_CHECKING:  # late: together they take seconds to import
    from sae_lens.saes.sae import SAE
    from transformer_lens.model_bridge import TransformerBridge


def _wide(text: str, **layout) -> dict:
    return {
        "description": text,
        "style": {"description_width": "110px"},
        "layout": w.Layout(**{"width": "310px", **layout}),
    }


def latent_panel(lm: TransformerBridge, sae: SAE, table: features.LatentTable, latent: int) -> w.Widget:
    """Search or pick a latent; see its strongest texts shaded, its histogram, what it promotes and suppresses."""
    door(lm=lm, sae=sae, table=table)
    search = w.Text(placeholder="a word, then Enter", continuous_update=False, **_wide("promotes word"))
    found = w.Dropdown(options=[("—", -1)], **_wide("found"))
    number = w.BoundedIntText(value=latent, min=0, max=sae.cfg.d_sae - 1, **_wide("latent"))
    texts, tokens, chart = w.HTML(), w.HTML(), w.Output()

    def look_up(change) -> None:
        ids = lm.tokenizer(" " + change["new"].strip(), add_special_tokens=False)["input_ids"][:1]
        if change["new"].strip() and ids:
            best = features.promoting(lm, sae, ids[0]).topk(12)
            found.options = [(f"{i}  ({v:+.2f})", i) for v, i in zip(best.values.tolist(), best.indices.tolist())]

    def show(_=None) -> None:
        texts.value = features.shaded(table, lm.tokenizer, number.value)
        tokens.value = features.token_table(lm, sae.W_dec[number.value]).to_html(border=0, escape=True)
        values = table.of(number.value)
        chart.clear_output(wait=True)
        with chart:
            fig, (ax,) = plots.panels(1, 4.2, 2.4)
            plots.histogram(ax, values[values > 0])
            ax.set(
                xlabel=f"activation, where active ({(values > 0).mean():.2%} of tokens)", title=f"latent {number.value}"
            )
            display(fig)
            plt.close(fig)

    search.observe(look_up, "value")
    found.observe(
        lambda c: setattr(number, "value", c["new"]) if c["new"] is not None and c["new"] >= 0 else None, "value"
    )
    number.observe(show, "value")
    show()
    return w.VBox([w.HBox([number, search, found]), w.HBox([chart, tokens]), texts])


def label_panel(
    queue: dict[str, list], path: Path, automatic: dict[str, str], others: dict[str, Path] | None = None
) -> w.Widget:
    """Label latents by hand: texts only, four classes by click or key, saved at every step, resumed from ``path``.

    ``queue``: texts (lists of (token, activation)) by an opaque key; the order is shuffled by the file's name, so that
    neither checkpoint nor number shows. ``automatic``: labels to compare with; ``others``: label files by person.

    Raises:
        ValueError: nothing to label, or ``path`` is not a label file.
    """
    if not queue:
        raise ValueError("no latents to label: sample some first")
    done: dict[str, str] = _labels(path) if path.exists() else {}
    order = np.random.default_rng(sum(path.stem.encode())).permutation(list(queue)).tolist()
    keys = {kind[i]: kind for kind, i in zip(language.GRANULARITIES, (0, 1, 0, 0))}  # t, y, s, u
    buttons = {kind: w.Button(description=f"{kind} ({key})") for key, kind in keys.items()}
    typed, back = w.Text(placeholder="or type a letter here", continuous_update=True), w.Button(description="back")
    texts, state = w.HTML(), w.HTML()

    def current() -> str | None:
        return next((key for key in order if key not in done), None)

    def show() -> None:
        key = current()
        texts.value = _marked(queue[key]) if key is not None else "<b>all done</b>"
        lines = [f"{len(done)} of {len(order)} labelled"]
        for name, theirs in {"automatic": automatic, **{n: _labels(p) for n, p in (others or {}).items()}}.items():
            both = [key for key in done if key in theirs]
            if len(both) > 1:
                kappa = cohen_kappa_score([done[key] for key in both], [theirs[key] for key in both])
                lines.append(f"κ with {html.escape(name)} {kappa:.2f} on {len(both)}")
        state.value = " · ".join(lines)

    def label(kind: str) -> None:
        if (key := current()) is not None:
            done[key] = kind
            _save_labels(path, done)
        show()

    def on_key(change: dict) -> None:
        if change["new"]:
            typed.value = ""
            if (kind := keys.get(change["new"][-1].lower())) is not None:
                label(kind)

    def undo(_) -> None:
        if done:
            done.popitem()
            _save_labels(path, done)
        show()

    for kind, button in buttons.items():
        button.on_click(lambda _, kind=kind: label(kind))
    typed.observe(on_key, "value")
    back.on_click(undo)
    show()
    return w.VBox([w.HBox([*buttons.values(), typed, back]), state, texts])


def _save_labels(path: Path, done: dict[str, str]) -> None:
    with files.whole(path) as tmp:
        tmp.write_text(json.dumps(done, indent=0))


def _labels(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a label file (empty or damaged): delete it to start again") from error
    if not isinstance(found, dict) or set(found.values()) - set(language.GRANULARITIES):
        raise ValueError(f"{path} is not a label file: values must be among {language.GRANULARITIES}")
    return found


def _marked(latent: list) -> str:
    top = max((a for text in latent for _, a in text), default=1.0)
    return "".join(
        features.shade(language.pieces([t for t, _ in text])[0], [a for _, a in text], top) for text in latent
    )
