"""What a latent does: the texts that activate it, and the tokens that its decoder direction promotes."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import Tensor
from tqdm.auto import tqdm

from saeutils import steering
from saeutils.analysis import language
from saeutils.kernels.door import door, require_latents
from saeutils.lm import parts, provenance
from saeutils.lm.activations import Activations
from saeutils.lm.tokens import encode

if TYPE_CHECKING:  # late: together they take seconds to import
    from sae_lens.saes.sae import SAE
    from transformer_lens.model_bridge import TransformerBridge

DENSE = 2**26  # entries of the largest dense block of activations: 256 MB


@dataclass(frozen=True)
class LatentTable:
    """Latent activations of every token of a corpus.

    ``acts``: sparse [tokens, d_sae]; ``doc``, ``token``: [tokens], in reading order; ``n_docs``: documents in the corpus.
    """

    acts: sparse.csc_array
    doc: np.ndarray
    token: np.ndarray
    n_docs: int

    def of(self, latent: int) -> np.ndarray:
        """Activation of one latent at every token, [tokens]."""
        rows, values = self._entries(latent)
        out = np.zeros(self.acts.shape[0], self.acts.dtype)
        out[rows] = values
        return out

    def max_per_doc(self) -> sparse.csc_array:
        """Largest activation of every latent in every document, sparse [n_docs, d_sae]."""
        coo = self.acts.tocoo()
        row, column = coo.coords
        frame = pd.DataFrame({"doc": self.doc[row], "latent": column, "value": coo.data})
        top = frame.groupby(["doc", "latent"], sort=False)["value"].max().reset_index()
        shape = (self.n_docs, self.acts.shape[1])
        return sparse.csc_array((top["value"], (top["doc"], top["latent"])), shape=shape)

    @cached_property
    def edges(self) -> np.ndarray:
        """Row at which each document begins, [n_docs + 1]."""
        return np.searchsorted(self.doc, np.arange(self.n_docs + 1))

    def _entries(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows, values) at which a latent is active."""
        (latent,) = require_latents(latent, self.acts.shape[1])
        span = slice(*self.acts.indptr[latent : latent + 2])
        return self.acts.indices[span], self.acts.data[span]

    def top_docs(self, latent: int, n: int = 8) -> list[int]:
        """Documents by their largest activation of a latent, the strongest first (silent ones left out)."""
        rows, values = self._entries(latent)
        strongest = np.argsort(-values, kind="stable")[: (values > 0).sum()]
        return list(dict.fromkeys(self.doc[rows[strongest]].tolist()))[:n]

    def top_texts(self, latent: int, tokens: np.ndarray, n: int = 50) -> list[list[tuple[str, float]]]:
        """The texts of :meth:`top_docs` as lists of (token, activation), what :mod:`saeutils.analysis.language` reads.

        ``tokens``: the token of every row as text, [tokens].
        """
        dense = dict(zip(*(part.tolist() for part in self._entries(latent))))
        spans = (range(*self.edges[doc : doc + 2]) for doc in self.top_docs(latent, n))
        return [[(tokens[i], dense.get(i, 0.0)) for i in span] for span in spans]


@torch.no_grad()
def latent_table(acts: Activations, sae: SAE, n_docs: int, l2: bool = False) -> LatentTable:
    """Encode every collected row; ``acts`` is a small set from :func:`saeutils.lm.activations.collect`. ``l2``: rows to norm 1.

    Raises:
        ValueError: the SAE has another input width than the activations, was trained at another hook point, or on scaled rows.
    """
    door(acts=acts, sae=sae, n_docs=n_docs)
    l2 = l2 or provenance.takes_unit_rows(sae)
    if not l2:
        provenance.require_raw(sae, acts.meta.get("hook", ""))
    if acts.d != sae.cfg.d_in:
        raise ValueError(f"activations have d={acts.d}, the SAE expects d_in={sae.cfg.d_in}: same LM and hook point?")
    rows = acts.all()
    return LatentTable(encoded(sae, rows["x"], l2).tocsc(), rows["doc"].numpy(), rows["token"].numpy(), n_docs)


@torch.no_grad()
def encoded(sae: SAE, x: Tensor, l2: bool = False) -> sparse.csr_array:
    """Latents of rows ``x`` [n, d], sparse [n, d_sae], a block of rows at a time. ``l2``: rows to norm 1."""
    parts = []
    blocks = x.split(max(1, DENSE // sae.cfg.d_sae))
    for block in tqdm(blocks, desc="encoding", leave=False, disable=len(blocks) < 20):
        block = torch.nn.functional.normalize(block, dim=1) if l2 else block
        dense = sae.encode(block.to(sae.device, sae.dtype))  # [batch, d_sae]
        at = dense.nonzero(as_tuple=True)
        entries = dense[at].float().cpu().numpy(), tuple(i.cpu().numpy() for i in at)
        parts.append(sparse.csr_array(entries, shape=tuple(dense.shape)))
    return sparse.vstack(parts)


@torch.no_grad()
def residual(lm: TransformerBridge, hook: str, ids: Tensor, edits: Sequence[steering.edits.Edit] = ()) -> Tensor:
    """Activations at ``hook`` for token ids [batch, position] under ``edits``, [batch, position, d]; later blocks do not run."""
    seen = {}

    def grab(x: Tensor, hook=None) -> None:
        seen["x"] = x

    with steering.edited(lm, [*edits, (hook, grab)]):
        lm(ids, stop_at_layer=int(hook.split(".")[1]) + 1)
    return seen["x"]


@torch.no_grad()
def top_latents(lm: TransformerBridge, sae: SAE, hook: str, prompt: str, n: int = 10) -> pd.Series:
    """The ``n`` strongest latents at the prompt's last token: activation by latent number."""
    door(lm=lm, sae=sae, hook=hook, prompt=prompt, n=n)
    x = residual(lm, hook, encode(lm, prompt))[0, -1:]
    values, indices = sae.encode(x.to(sae.device, sae.dtype))[0].topk(n)
    return pd.Series(values.float().cpu().numpy(), index=indices.tolist(), name=prompt)


@torch.no_grad()
def promoted(lm: TransformerBridge, direction: Tensor) -> Tensor:
    """Effect of residual directions [d] or [n, d] on every logit by the direct path, [vocabulary] or [n, vocabulary].

    The logit lens, centred. The final norm's gain is applied, its data-dependent scale is not: compare tokens, not sizes.
    """
    door(lm=lm, direction=direction)
    weight = lm.original_model.get_output_embeddings().weight  # [vocabulary, d]
    gain, centres = parts.final_norm(lm)
    direction = direction.float().to(weight.device)
    read = gain.to(weight.device) * (direction - direction.mean(-1, keepdim=True) if centres else direction)
    logits = torch.cat([read @ part.float().T for part in weight.split(8192)], dim=-1)  # float32 copies that fit the cache
    return logits - logits.mean(-1, keepdim=True)


def token_table(lm: TransformerBridge, direction: Tensor, n: int = 10) -> pd.DataFrame:
    """The ``n`` tokens that a direction [d] promotes and suppresses most, see :func:`promoted`; columns ``promotes``, ``suppresses``."""
    door(lm=lm, direction=direction, n=n)
    logits = promoted(lm, direction)
    columns = {}
    for name, sign in (("promotes", 1), ("suppresses", -1)):
        ids = (sign * logits).topk(n).indices.tolist()
        columns[name] = [lm.tokenizer.decode([i]) for i in ids]
    return pd.DataFrame(columns)


def shade(pieces: Sequence[str], values: Sequence[float], largest: float) -> str:
    """One text as a line of HTML, each piece shaded by its activation; all text is escaped."""
    spans = [
        f'<span style="background:rgba(255,120,0,{max(0.0, v) / largest:.2f})" title="{v:.3g}">{html.escape(p).replace(chr(10), "↵")}</span>'
        for p, v in zip(pieces, values)
    ]
    return f'<div style="margin:2px 0;font-family:monospace;white-space:pre-wrap">{"".join(spans)}</div>'


def shaded(
    table: LatentTable, tokenizer, latent: int, docs: Sequence[int] | None = None, n: int = 8, around: int | None = None
) -> str:  # fmt: skip
    """HTML of the strongest documents, each token shaded by its activation; all text is escaped.

    ``around``: show so many tokens on either side of a document's peak, … where it is cut; None: whole documents.
    """
    door(table=table, tokenizer=tokenizer, n=n)
    values = table.of(latent)
    largest = max(values.max(initial=0.0), 1e-9)
    lines = []
    for doc in table.top_docs(latent, n) if docs is None else docs:
        first, last = start, stop = table.edges[doc : doc + 2].tolist()
        if around is not None:
            peak = first + int(values[first:last].argmax())
            start, stop = max(first, peak - around), min(last, peak + around + 1)
        pieces, _ = language.pieces(tokenizer.convert_ids_to_tokens(table.token[start:stop].tolist()))
        before, after = ["…"] * (start > first), ["…"] * (stop < last)
        silent = [0.0] * len(before), [0.0] * len(after)
        lines.append(shade([*before, *pieces, *after], [*silent[0], *values[start:stop], *silent[1]], largest))
    return "".join(lines) or f"<i>latent {latent} is silent on these {table.n_docs:,} texts</i>"


@torch.no_grad()
def promoting(lm: TransformerBridge, sae: SAE, token: int) -> Tensor:
    """How much every latent's decoder row promotes one token by the direct path, per unit of its norm, [d_sae]."""
    door(lm=lm, sae=sae, token=token)
    weight = lm.original_model.get_output_embeddings().weight
    gain, centres = parts.final_norm(lm)
    read = (weight[token].float() - weight.mean(0, dtype=torch.float32)) * gain.to(weight.device)  # [d]
    if centres:
        read = read - read.mean()
    rows = torch.nn.functional.normalize(sae.W_dec.float(), dim=1)
    return rows @ read.to(rows.device)
