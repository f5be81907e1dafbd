"""Latents of two SAEs beside each other: how alike they write, how alike they fire, and on which texts."""

from __future__ import annotations

from collections.abc import Mapping

import ipywidgets as w
import pandas as pd

from saeutils.analysis import features
from saeutils.kernels.door import door
from saeutils.notebook.widgets import live
from saeutils.notebook.widgets.chooser import Chooser

LISTED, TEXTS, AROUND = 300, 6, 15  # pairs in the list, texts a latent, tokens on either side of a peak
ORDERS = {
    "alike vectors, different texts": lambda pairs: pairs["correlation"] - pairs["cosine"],
    "alike in activation": lambda pairs: -pairs["correlation"],
    "unlike in activation": lambda pairs: pairs["correlation"],
}
COLUMNS = {"latent", "partner", "correlation", "cosine", "fate"}


def pairs_panel(
    pairs: Mapping[str, pd.DataFrame], tables: Mapping[str, tuple[features.LatentTable, features.LatentTable]], tokenizer
) -> None:
    """Show the panel: for each arm its pairs (columns latent, partner, correlation, cosine, fate) and both SAEs' tables.

    Raises:
        ValueError: no arms, an arm without pairs or without tables, missing columns.
    """
    door(tokenizer=tokenizer)
    if not pairs or set(pairs) != set(tables):
        raise ValueError(f"pairs of {sorted(pairs)}, tables of {sorted(tables)}: both need the same arms, at least one")
    for arm, of in pairs.items():
        if missing := COLUMNS - set(of):
            raise ValueError(f"pairs of {arm!r} lack {', '.join(sorted(missing))}")
        if of.empty:
            raise ValueError(f"pairs of {arm!r} is empty: no latent fires often enough")
    panel = _Pairs(pairs, tables, tokenizer)
    live.show(panel.worker, panel.board([panel.arm, panel.fate, panel.order]), panel.find, lambda: panel.texts.value)


class _Pairs(Chooser):
    def __init__(self, pairs, tables, tokenizer):
        super().__init__()
        self.pairs, self.tables, self.tokenizer = pairs, tables, tokenizer
        wide = {"style": {"description_width": "50px"}, "layout": w.Layout(width="300px")}
        fates = sorted({fate for of in pairs.values() for fate in of["fate"]})
        self.arm = w.Dropdown(options=list(pairs), description="arm", **wide)
        self.fate = w.Dropdown(options=["all", *fates], description="fate", **wide)
        self.order = w.Dropdown(options=list(ORDERS), description="first", **wide)
        self.find_again([self.arm, self.fate, self.order])

    def find(self, turn: live.Turn) -> None:
        """The pairs that the controls ask for, in their order."""
        of = self.pairs[self.arm.value]
        if self.fate.value != "all":
            of = of[of["fate"] == self.fate.value]
        if of.empty:
            raise ValueError(f"no latent of {self.arm.value!r} is {self.fate.value}")
        of = of.loc[ORDERS[self.order.value](of).sort_values(kind="stable").index[:LISTED]]
        turn.check()
        rows = [(f"{row.latent} – {row.partner} · {row.correlation:.2f} · {row.fate}", row.Index) for row in of.itertuples()]
        self.fill(rows, turn)

    def read(self, turn: live.Turn) -> None:
        """The texts of both latents of the chosen pair, side by side."""
        row = self.pairs[self.arm.value].loc[self.listed.value]
        cells = []
        for side, table, latent in zip("AB", self.tables[self.arm.value], (row["latent"], row["partner"])):
            turn.check()
            shown = features.shaded(table, self.tokenizer, int(latent), n=TEXTS, around=AROUND)
            cells.append(f"<td style='vertical-align:top;width:50%;padding:4px;text-align:left'><b>side {side}, latent {latent}</b>{shown}</td>")
        head = f"{self.arm.value}: activations correlate at {row['correlation']:.2f}, decoder rows at {row['cosine']:.2f}: {row['fate']}"
        self.texts.value = f"<b>{head}</b><table style='width:100%;table-layout:fixed'><tr>{''.join(cells)}</tr></table>"
