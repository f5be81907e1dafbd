"""One-to-one matching of two dictionaries by cosine, exact, and how stable training is across seeds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import lap
import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

if TYPE_CHECKING:  # late: together they take seconds to import
    from sae_lens.saes.sae import SAE

CANDIDATES = 24  # columns of each row in the first sparse problem; what is missing is added by need
DENSE_BELOW = 1024  # rows under which scipy's dense solver is quick enough
ROUNDS = 8
LONGEST = 1000  # steps of a path
MARGIN = 1e-3  # the first round also takes pairs this close to their bound: later rounds shift prices
BLOCK = 128  # rows looked at together: they stay in the processor's cache
TIGHT = 1e-10  # a cosine this far above its dual bound counts as a violation


def match(A: Tensor, B: Tensor, *, dense_below: int = DENSE_BELOW) -> tuple[Tensor, Tensor]:
    """Exact maximum-cosine assignment between the rows of ``A`` [n, d] and ``B`` [m, d].

    Solves the assignment on each row's nearest columns only, then proves or repairs it: from the sparse optimum come dual
    prices u, v, and every pair of the dense matrix with cos > u + v joins the candidates until there is none. At that
    point the dual bound equals the total, so no assignment of the dense problem is better (linear-programming duality).
    Small and rectangular problems go to scipy's dense solver. Memory: the cosine matrix in float32, 4·n·m bytes, and a
    fraction of it.

    Returns:
        partner: [n] row of ``B`` for each row of ``A``, −1 for the rows left over where n > m.
        cosine: [n] float32, NaN for those.

    Raises:
        ValueError: not two matrices of one width, empty, NaN or inf in the weights.
    """
    A, B = _unit(A, "A"), _unit(B, "B")
    if A.shape[1] != B.shape[1]:
        raise ValueError(f"A has width {A.shape[1]}, B {B.shape[1]}: match rows of the same space (same hook point)")
    if flipped := len(A) > len(B):
        A, B = B, A
    cosines = (A @ B.T).cpu().numpy()  # [n, m], n ≤ m
    column = None if len(A) < max(dense_below, len(B)) else _sparse_assignment(cosines)
    if column is None:
        column = linear_sum_assignment(cosines, maximize=True)[1]
    best = torch.from_numpy(cosines[np.arange(len(column)), column])
    column = torch.from_numpy(column.astype(np.int64))
    if not flipped:
        return column, best
    partner, cosine = torch.full((len(B),), -1), torch.full((len(B),), torch.nan)
    partner[column], cosine[column] = torch.arange(len(A)), best
    return partner, cosine


def _unit(W: Tensor, name: str) -> Tensor:
    W = torch.as_tensor(W).detach().float()
    if W.ndim != 2 or not len(W):
        raise ValueError(f"{name} is {tuple(W.shape)}: give a matrix with one latent a row")
    if not (finite := torch.isfinite(W).all(1)).all():
        raise ValueError(f"{name} has NaN or inf in {int((~finite).sum())} rows: the training diverged, train it again")
    return W / W.norm(dim=1, keepdim=True).clamp_min(1e-12)  # a zero row has cosine 0 with everything


def _sparse_assignment(cosines: np.ndarray) -> np.ndarray | None:
    """Column of every row in an optimal assignment of the dense problem, or None if it was not proven in ROUNDS."""
    n = len(cosines)
    dense = torch.from_numpy(cosines)
    near = dense.topk(min(CANDIDATES, n), dim=1, sorted=False).indices.numpy()  # [n, K]
    some = np.arange(n) * (n + 1)  # (i, i): a full assignment is possible
    known, v = np.union1d((np.arange(n)[:, None] * n + near).ravel(), some), np.zeros(n)
    for round in range(ROUNDS):
        row, column = np.divmod(known, n)
        value = cosines[row, column].astype(np.float64)
        # relative to the last prices all costs are ≥ 0 and 0 where those were right: the solver mends the rest
        chosen = _solve(n, row, column, value - v[column])
        u, v, settled = _prices(row, column, value, chosen, cosines[np.arange(n), chosen].astype(np.float64))
        if not settled:
            return None
        if not len(new := _violations(dense, u, v, MARGIN if round == 0 else 0.0)):
            return chosen
        known = np.union1d(known, new)
    return None


def _solve(n: int, row: np.ndarray, column: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Column of every row in the best assignment of the sparse problem with entries ``value``, ordered by row."""
    first = np.searchsorted(row, np.arange(n + 1))
    cost = np.maximum.reduceat(value, first[:-1])[row] - value
    return lap.lapmod(n, cost, first.astype(np.int32), column.astype(np.int32), return_cost=False)[0]


def _prices(
    row: np.ndarray, column: np.ndarray, value: np.ndarray, chosen: np.ndarray, own: np.ndarray
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Dual prices u [n], v [m] ≥ 0 of an optimal sparse assignment: cos ≤ u + v on every candidate, = on chosen ones (``own``).

    v is the least fixed point of v_j = max(0, max_i v_σ(i) + c_ij − c_iσ(i)): longest paths by Bellman and Ford.
    Not settled (False) where those are longer than LONGEST: rows that all compete for the same columns.
    """
    order = np.argsort(column, kind="stable")
    source, gain, target = chosen[row[order]], (value - own[row])[order], column[order]
    first = np.flatnonzero(np.r_[True, target[1:] != target[:-1]])
    v = np.zeros(len(chosen))
    for _ in range(LONGEST):
        raised = np.maximum(v[target[first]], np.maximum.reduceat(v[source] + gain, first))
        change = raised - v[target[first]]
        v[target[first]] = raised
        if change.max() <= TIGHT / 10:
            return own - v[chosen], v, True
    return own - v[chosen], v, False


def _violations(dense: Tensor, u: np.ndarray, v: np.ndarray, margin: float, most: int = 16) -> np.ndarray:
    """Keys i·m + j of pairs above their dual bound less ``margin``, the ``most`` worst of a row."""
    found, m = [], dense.shape[1]
    v32 = torch.from_numpy(v).float()
    for at in range(0, len(dense), BLOCK):
        bound = torch.from_numpy(u[at : at + BLOCK])
        over = dense[at : at + BLOCK] - v32  # [block, m], in float32: only a first, generous look
        i, j = (over > (bound.float() - margin - 1e-6)[:, None]).nonzero(as_tuple=True)
        excess = dense[at + i, j].double() - torch.from_numpy(v)[j] - bound[i]
        real = excess > TIGHT - margin
        i, j, excess = i[real], j[real], excess[real]
        worst = excess.argsort(descending=True)
        i, j = i[worst], j[worst]
        by_row = i.argsort(stable=True)
        i, j = i[by_row], j[by_row]
        rank = torch.arange(len(i)) - torch.searchsorted(i, i)  # place of each pair among those of its row
        found.append(((at + i) * m + j)[rank < most].numpy())
    return np.concatenate(found)


def compare(a: SAE, b: SAE) -> pd.DataFrame:
    """Match encoder rows and decoder columns of two SAEs separately (Paulo & Belrose 2025, arXiv:2501.16615).

    One row per latent i of ``a``: ``encoder`` = C^enc_{i,π(i)}, ``decoder`` = C^dec_{i,σ(i)}, ``pi``, ``sigma``, ``same``
    (π(i) = σ(i)).

    Raises:
        ValueError: the SAEs differ in d_in or d_sae; NaN weights.
    """
    for name in ("d_in", "d_sae"):
        x, y = getattr(a.cfg, name), getattr(b.cfg, name)
        if x != y:
            raise ValueError(
                f"{name} is {x} and {y}: stability compares SAEs of one shape; match() takes any two widths"
            )
    pi, encoder = match(a.W_enc.T, b.W_enc.T)
    sigma, decoder = match(a.W_dec, b.W_dec)
    columns = dict(encoder=encoder, decoder=decoder, pi=pi, sigma=sigma, same=pi == sigma)
    return pd.DataFrame({name: values.numpy() for name, values in columns.items()})


def stability(matched: pd.DataFrame) -> dict[str, float]:
    """Of a table from :func:`compare`: share with π = σ, mean matched decoder and encoder cosine, shares above .7 and .9."""
    decoder = matched["decoder"]
    return {
        "pi = sigma": float(matched["same"].mean()),
        "decoder": float(decoder.mean()),
        "encoder": float(matched["encoder"].mean()),
        "> .7": float((decoder > 0.7).mean()),
        "> .9": float((decoder > 0.9).mean()),
    }


def pw_mcc(saes: Sequence[SAE]) -> tuple[float, list[float]]:
    """Pairwise mean matched decoder cosine of several SAEs: (mean over pairs, one figure a pair).

    The PW-MCC of Song et al. 2025 (arXiv:2505.20254), with one-to-one matching.

    Raises:
        ValueError: fewer than two SAEs.
    """
    if len(saes) < 2:
        raise ValueError("PW-MCC needs at least two SAEs: train another seed")
    pairs = [float(match(a.W_dec, b.W_dec)[1].nanmean()) for a, b in combinations(saes, 2)]
    return float(np.mean(pairs)), pairs
