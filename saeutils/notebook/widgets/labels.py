"""Labelling latents by hand."""

from __future__ import annotations

import html
import json
from pathlib import Path

import ipywidgets as w
import numpy as np
from sklearn.metrics import cohen_kappa_score

from saeutils.analysis import features, language
from saeutils.kernels import files


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
