"""Measures of SAEs and of their dictionaries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor

if TYPE_CHECKING:  # late: together they take seconds to import
    from sae_lens.saes.sae import SAE


def squared_error(reconstruction: Tensor, x: Tensor) -> Tensor:
    """Mean of ‖x̂ − x‖² over rows [n, d]; one pass over memory where powers and sums of the difference take three."""
    return F.mse_loss(reconstruction, x, reduction="sum") / len(x)


def fvu(x: Tensor, reconstruction: Tensor) -> float:
    """Fraction of variance unexplained: Σ‖x − x̂‖² / Σ‖x − mean(x)‖² over rows [n, d]."""
    return float((x - reconstruction).pow(2).sum() / (x - x.mean(0)).pow(2).sum())


@torch.no_grad()
def evaluate(sae: SAE, x: Tensor, batch_size: int = 2048) -> dict[str, float]:
    """FVU, mean L0 and share of latents that never fire over rows ``x`` [n, d_in]."""
    out, l0, fired = torch.empty_like(x), 0.0, torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=x.device)
    for at in range(0, len(x), batch_size):
        acts = sae.encode(x[at : at + batch_size])  # [batch, d_sae]
        out[at : at + batch_size] = sae.decode(acts)
        active = (acts.to_dense() if acts.is_sparse else acts) != 0
        l0 += float(active.sum())
        fired |= active.any(0)
    return {"fvu": fvu(x, out), "l0": l0 / len(x), "dead": float((~fired).float().mean())}


@torch.no_grad()
def decoder_cosines(W_dec: Tensor, rows: int | None = None, seed: int = 0, block: int = 1024):
    """Yield |cos| between decoder rows [block, n − 1] piece by piece, each row's own cosine left out.

    Args:
        W_dec: [n, d].
        rows: compare so many random rows with all others; None: every row (the full Gram matrix, never held at once).
    """
    unit = W_dec / W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)
    n = len(unit)
    picked = torch.arange(n)
    if rows is not None and rows < n:
        picked = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:rows]
    for part in picked.to(W_dec.device).split(block):
        cosines = (unit[part] @ unit.T).abs()  # [block, n]
        keep = torch.ones_like(cosines, dtype=torch.bool)
        keep[torch.arange(len(part), device=W_dec.device), part] = False
        yield cosines[keep].view(len(part), n - 1)


def orthogonality(W_dec: Tensor, rows: int | None = None, seed: int = 0) -> dict[str, float]:
    """Mean and maximum |cos| between different decoder rows; see :func:`decoder_cosines` for ``rows``."""
    total, count, largest = 0.0, 0, 0.0
    for cosines in decoder_cosines(W_dec, rows, seed):
        total += float(cosines.double().sum())
        count += cosines.numel()
        largest = max(largest, float(cosines.max()))
    return {"mean": total / count, "max": largest}


def random_orthogonality(d: int) -> float:
    """E|cos| between random directions in d dimensions, √(2/(πd)) (large-d limit)."""
    return float(np.sqrt(2 / (np.pi * d)))


def auroc(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of every column of ``scores`` [n, m] against binary ``labels`` [n] → [m]; ties count half.

    By the rank-sum identity, AUROC = (R₁ − n₁(n₁+1)/2)/(n₁n₀) (Mann–Whitney), all columns at once.

    Raises:
        ValueError: the labels are not of two classes.
    """
    labels = np.asarray(labels).astype(bool)
    positive, negative = int(labels.sum()), int((~labels).sum())
    if not positive or not negative:
        raise ValueError("AUROC needs both classes among the labels")
    ranks = rankdata(scores, axis=0)  # [n, m]
    return (ranks[labels].sum(0) - positive * (positive + 1) / 2) / (positive * negative)


@torch.no_grad()
def fragmentation(z: Tensor, relation: Tensor) -> pd.DataFrame:
    """How many latents carry a concept: EffFeat = exp(entropy) and Top1Conc = largest share, one row a concept.

    Shares are those of the mean activation over the concept's rows, clipped at 0; NaN where all are silent. z [n, latents], relation [n].
    """
    rows = []
    for concept in relation.unique().tolist():
        mean = z[relation == concept].float().mean(0).clamp_min(0)
        share = mean / mean.sum()
        entropy = -(share * share.clamp_min(1e-12).log()).sum()
        rows.append({"concept": concept, "EffFeat": float(entropy.exp()), "Top1Conc": float(share.max())})
    return pd.DataFrame(rows)
