"""HTML of what panels show, live and as their static rendering; all text is escaped here."""

from __future__ import annotations

import base64
import difflib
import html
import io
import re
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from saeutils.analysis import features

WORD = re.compile(r"\s*\S+|\s+$")
AROUND = 15  # tokens shown on either side of a latent's peak


def visible(piece: str) -> str:
    """A token as a short label: blanks, line ends and nothing at all can be seen."""
    shown = piece.replace("\n", "↵").replace("\t", "⇥")
    return shown if shown.strip() else "␣" * max(1, len(shown))


def picture(fig: Figure) -> str:
    """A figure as an image of its own, as wide as its panel at most; the figure is closed."""
    image = io.BytesIO()
    fig.savefig(image, format="png")
    plt.close(fig)
    return f"<img style='max-width:100%' src='data:image/png;base64,{base64.b64encode(image.getvalue()).decode()}'>"


def tokens(pieces: Sequence[str], values: np.ndarray) -> str:
    """A sentence, its tokens shaded by one latent's activations [tokens]."""
    return features.shade(pieces, values, max(float(values.max(initial=0.0)), 1e-9))


def histogram(values: np.ndarray, bins: int = 24, width: int = 220, height: int = 60) -> str:
    """Where a latent is active, how strongly: bars of logarithmic height, as SVG."""
    if not len(values):
        return ""
    counts, edges = np.histogram(values, bins)
    tall = np.log1p(counts) / np.log1p(counts.max()) * (height - 14)
    step = width / bins
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{height - 12 - t:.1f}" width="{step - 1:.1f}" height="{t:.1f}" fill="#0072B2"/>'
        for i, t in enumerate(tall)
    )
    ends = f'<text x="0" y="{height}">{edges[0]:.3g}</text><text x="{width}" y="{height}" text-anchor="end">{edges[-1]:.3g}</text>'
    return f'<svg width="{width}" height="{height}" font-size="10" role="img" aria-label="histogram of activations">{bars}{ends}</svg>'


def card(number: int, label: str, table: features.LatentTable, tokenizer, words: Mapping[str, Sequence[str]], link: str = "") -> str:
    """A latent's card; ``words``: what its decoder row promotes and suppresses."""
    values = table.of(number)
    active = values[values > 0]
    page = f' · <a href="{html.escape(link)}" target="_blank">Neuronpedia</a>' if link else ""
    lists = "".join(f"<div><b>{name}</b> {html.escape(' · '.join(map(visible, given)))}</div>" for name, given in words.items())
    return (
        f"<div><b>latent {number}</b> · {html.escape(label)}{page}</div>"
        f"<div>active on {len(active) / max(1, len(values)):.2%} of {len(values):,} tokens</div>"
        f"{histogram(active)}{lists}<div style='margin-top:4px'><b>strongest texts</b></div>{features.shaded(table, tokenizer, number, n=10, around=AROUND)}"
    )


def marked(text: str, other: str) -> str:
    """``text`` with the words that ``other`` lacks at their place marked."""
    ours, theirs = WORD.findall(text), WORD.findall(other)
    out = []
    for kind, start, stop, _, _ in difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        if part := html.escape("".join(ours[start:stop])):
            out.append(part if kind == "equal" else f"<mark style='background:#ffe0b0'>{part}</mark>")
    return "".join(out)


def comparison(prompt: str, written: Mapping[str, str]) -> str:
    """Continuations side by side; what differs from the first is marked."""
    first = next(iter(written.values()), "")
    cells = "".join(
        f"<td style='vertical-align:top;text-align:left;width:{100 / len(written):.0f}%;white-space:pre-wrap;overflow-wrap:anywhere'>"
        f"<b>{html.escape(name)}</b><br>{html.escape(prompt)}{html.escape(text) if text == first else marked(text, first)}</td>"
        for name, text in written.items()
    )
    return f"<table style='width:100%;table-layout:fixed'><tr>{cells}</tr></table>"


def meters(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Measures (rows) of each text (columns) as numbers over bars: measure → text → value."""
    names = list(next(iter(rows.values())))
    out = ["<tr><td></td>" + "".join(f"<td><b>{html.escape(name)}</b></td>" for name in names) + "</tr>"]
    for measure, values in rows.items():
        largest = max([abs(v) for v in values.values() if np.isfinite(v)] + [1.0])
        bars = "".join(
            f"<td>{v:+.2f}<div style='background:#0072B2;height:5px;width:{70 * abs(v) / largest:.0f}px'></div></td>"
            if np.isfinite(v)
            else "<td>–</td>"
            for v in values.values()
        )
        out.append(f"<tr><td>{html.escape(measure)}</td>{bars}</tr>")
    return f"<table>{''.join(out)}</table>"
