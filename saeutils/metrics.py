"""Measures of SAEs and of their dictionaries, and intervals of what was measured: pure functions of arrays."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:  # late: together they take seconds to import
    import pandas as pd
    from sae_lens.saes.sae import SAE

LEVEL = 0.95  # of every interval
FEWEST = 20  # units under which a bootstrap is not to be trusted


def squared_error(reconstruction: Tensor, x: Tensor) -> Tensor:
    """Mean of ‖x̂ − x‖² over rows [n, d]; one pass over memory where powers and sums of the difference take three."""
    return F.mse_loss(reconstruction, x, reduction="sum") / len(x)


def fvu(x: Tensor, reconstruction: Tensor) -> float:
    """Fraction of variance unexplained: Σ‖x − x̂‖² / Σ‖x − mean(x)‖² over rows [n, d], summed in float32 whatever they are in.

    Raises:
        ValueError: no rows, or rows that do not vary.
    """
    x, reconstruction = x.float(), reconstruction.float()
    if not float(variance := (x - x.mean(0)).pow(2).sum()) > 0:  # NaN too
        raise ValueError(f"fvu: {len(x):,} rows of variance {float(variance):.3g}: there is nothing to explain")
    return float((x - reconstruction).pow(2).sum() / variance)


@torch.no_grad()
def evaluate(sae: SAE, x: Tensor, batch_size: int = 2048) -> dict[str, float]:
    """FVU, mean L0 and share of latents that never fire over rows ``x`` [n, d_in]."""
    out, l0, fired = torch.empty_like(x, dtype=torch.float32), 0.0, torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=sae.device)
    for at in range(0, len(x), batch_size):
        acts = sae.encode(x[at : at + batch_size].to(sae.device, sae.dtype))  # [batch, d_sae]
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
    """Mean and maximum |cos| between different rows of W_dec [n, d], NaN of a single one; see :func:`decoder_cosines` for ``rows``."""
    if len(W_dec) < 2:
        return {"mean": float("nan"), "max": float("nan")}
    total, count, largest = 0.0, 0, 0.0
    for cosines in decoder_cosines(W_dec, rows, seed):
        total += float(cosines.double().sum())
        count += cosines.numel()
        largest = max(largest, float(cosines.max()))
    return {"mean": total / count, "max": largest}


def random_orthogonality(d: int) -> float:
    """E|cos| between random directions in d dimensions, √(2/(πd)) (large-d limit)."""
    return float(np.sqrt(2 / (np.pi * d)))


def repetition(tokens: Sequence[int]) -> float:
    """Share of token pairs of one text that have been there before, a scalar from 0 to 1; 0 for less than two tokens."""
    pairs = list(pairwise(tokens))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def require_two_classes(labels: np.ndarray, what: str) -> np.ndarray:
    """``labels`` [n] as booleans.

    Raises:
        ValueError: they are of one class, or of none.
    """
    labels = np.asarray(labels) > 0
    if not labels.any() or labels.all():
        raise ValueError(f"{what}: {len(labels):,} labels, {int(labels.sum()):,} of them positive: both classes are needed")
    return labels


def require_finite(values: np.ndarray | Tensor, what: str) -> None:
    """``values`` of any shape [...].

    Raises:
        ValueError: NaN or inf.
    """
    if not bool((torch if isinstance(values, Tensor) else np).isfinite(values).all()):
        raise ValueError(f"{what} has NaN or inf")


def auroc(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of every column of ``scores`` [n, m] against binary ``labels`` [n] → [m]; ties count half.

    By the rank-sum identity, AUROC = (R₁ − n₁(n₁+1)/2)/(n₁n₀) (Mann–Whitney), all columns at once.

    Raises:
        ValueError: labels of one class, NaN or inf among the scores, one of each a row.
    """
    scores, labels = np.asarray(scores), require_two_classes(labels, "AUROC")
    require_finite(scores, "AUROC: scores")
    if len(scores) != len(labels):
        raise ValueError(f"AUROC: {len(scores):,} scores and {len(labels):,} labels: one of each a row")
    positive, negative = int(labels.sum()), int((~labels).sum())
    from scipy.stats import rankdata  # late: half a second

    ranks = rankdata(scores, axis=0)  # [n, m]
    return (ranks[labels].sum(0) - positive * (positive + 1) / 2) / (positive * negative)


@torch.no_grad()
def fragmentation(z: Tensor, relation: Tensor) -> pd.DataFrame:
    """How many latents carry a concept: EffFeat = exp(entropy) and Top1Conc = largest share, one row a concept.

    Shares are those of the mean activation over the concept's rows, clipped at 0; NaN where all are silent. z [n, latents], relation [n].
    """
    import pandas as pd

    rows = []
    for concept in relation.unique().tolist():
        mean = z[relation == concept].float().mean(0).clamp_min(0)
        share = mean / mean.sum()
        entropy = -(share * share.clamp_min(1e-12).log()).sum()
        rows.append({"concept": concept, "EffFeat": float(entropy.exp()), "Top1Conc": float(share.max())})
    return pd.DataFrame(rows)


class Interval(NamedTuple):
    """A figure and its 95% interval."""

    here: float
    low: float
    high: float


def interval(values: np.ndarray, statistic: str | Callable = "mean", items: int | None = None) -> Interval:
    """A statistic over independent units, and its 95% interval.

    Mean of ``values`` [units]: Student's t. Of ``values`` [units, items], the same items under every unit: both vary, their
    variances add, t with the smaller degrees of freedom. Of shares of ``items`` things: never narrower than the interval of
    Wilson (1927). Any other statistic of ``values`` [units, …]: bootstrap over units, BCa (Efron 1987).

    Args:
        statistic: "mean", "median", or a function of an array like ``values``.
        items: each value is a share; of so many different things all together.

    Returns:
        Interval: NaN bounds for one unit alone, or for fewer than 20 where a bootstrap is needed.

    Raises:
        ValueError: ``items`` with values that are no shares or with another statistic than the mean.
    """
    values = np.asarray(values, dtype=float)
    if items is not None and (statistic != "mean" or values.ndim != 1 or not items > 0 or not _shares(values)):
        raise ValueError("items says of how many things each value is a share: give shares in [0, 1], statistic='mean'")
    if statistic != "mean":
        return _bootstrapped(values, statistic)
    here, error, df = _error_of_mean(values)
    low, high = here - _t(df) * error, here + _t(df) * error
    if items is not None:
        under, over = wilson(here, items)
        low, high = np.fmin(low, under), np.fmax(high, over)
    return Interval(here, float(low), float(high))


def difference(
    values: np.ndarray, control: np.ndarray, statistic: str | Callable = "mean", items: int | None = None, paired: bool = True
) -> Interval:
    """Statistic of ``values`` less that of ``control``, and its 95% interval; arguments as for :func:`interval`.

    ``paired``: row i of both [units, …] is the same unit (t over the differences); else Welch's t. Of shares the variance is at least
    the binomial one (Agresti & Caffo 2000). It is never one interval less another.
    """
    values, control = np.asarray(values, dtype=float), np.asarray(control, dtype=float)
    if statistic != "mean":
        return _bootstrapped(values, statistic, control, paired)
    if paired:
        here, error, df = _error_of_mean(values - control)
    else:
        (a, error_a, df_a), (b, error_b, df_b) = _error_of_mean(values), _error_of_mean(control)
        here, error = a - b, float(np.hypot(error_a, error_b))
        total = error_a**4 / df_a + error_b**4 / df_b if df_a and df_b else 0.0
        df = error**4 / total if total else min(df_a, df_b)  # Welch and Satterthwaite
    if items is not None:
        p, q = ((share.mean() * items + 1) / (items + 2) for share in (values, control))
        error = max(error, float(np.sqrt((p * (1 - p) + q * (1 - q)) / (items + 2))))
    return Interval(here, here - _t(df) * error, here + _t(df) * error)


def wilson(share: float, n: int) -> tuple[float, float]:
    """95% interval of a share of ``n`` (Wilson 1927): (low, high)."""
    z = _t(np.inf)
    centre, half = share + z * z / (2 * n), z * float(np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def _t(df: float) -> float:
    from scipy.special import ndtri, stdtrit

    if not df:
        return float("nan")
    return float(ndtri((1 + LEVEL) / 2) if np.isinf(df) else stdtrit(df, (1 + LEVEL) / 2))


def _error_of_mean(values: np.ndarray) -> tuple[float, float, float]:
    """(mean, its standard error, degrees of freedom) of values [units] or [units, items]."""
    axes = [values.mean(tuple(j for j in range(values.ndim) if j != i)) for i in range(values.ndim)]
    df = min(len(means) - 1 for means in axes)
    if not df:
        return float(values.mean()), float("nan"), 0
    return float(values.mean()), float(np.sqrt(sum(m.var(ddof=1) / len(m) for m in axes))), df


def _shares(values: np.ndarray) -> bool:
    return bool(((values >= 0) & (values <= 1)).all())


def _bootstrapped(
    values: np.ndarray, statistic: str | Callable, control: np.ndarray | None = None, paired: bool = True
) -> Interval:
    named = {"median": np.median}
    if isinstance(statistic, str) and statistic not in named:
        raise ValueError(f"unknown statistic {statistic!r}: 'mean', 'median', or a function of the values")
    of = named.get(statistic, statistic) if isinstance(statistic, str) else statistic
    groups = [values] if control is None else [values, control]
    signs = (1, -1)
    here = float(sum(sign * of(group) for sign, group in zip(signs, groups)))
    if min(map(len, groups)) < FEWEST:
        return Interval(here, float("nan"), float("nan"))
    from scipy.stats import bootstrap  # late: half a second

    def resampled(*drawn: np.ndarray) -> float:
        chosen = drawn if len(drawn) == len(groups) else drawn * len(groups)  # paired: one draw of units for both
        return sum(sign * of(group[at]) for sign, group, at in zip(signs, groups, chosen))

    units = [np.arange(len(group)) for group in groups]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The BCa confidence interval cannot be calculated")
        found = bootstrap(
            units[:1] if paired else units, resampled, vectorized=False, n_resamples=1999, confidence_level=LEVEL,
            method="BCa", rng=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
    if np.isnan(found.low):  # every resample gives the same
        return Interval(here, here, here)
    return Interval(here, float(found.low), float(found.high))
