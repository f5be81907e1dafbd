"""One-to-one matching of two dictionaries by cosine, exact, and how stable training is across seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import lap
import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from tqdm.auto import tqdm

from saeutils.kernels import search
from saeutils.kernels.door import door

if TYPE_CHECKING:  # late: together they take seconds to import
    from sae_lens.saes.sae import SAE

NEIGHBOURS = 24  # columns of each row in the first sparse problem; what is missing is added by need
DENSE_BELOW = 1024  # rows under which scipy's dense solver is quick enough
ROUNDS = 8
LONGEST = 1000  # steps of a path
MARGIN = 1e-2  # the first round also takes pairs this close to their bound: later rounds shift prices
WORST = 32  # pairs above their bound that a row adds in a round
TIGHT = 1e-10  # a cosine this far above its dual bound counts as a violation
CONTESTED = 24  # violations a row above which rows compete for the same columns: scipy is quicker
PART = 2**24  # pairs of a GPU's block that the host looks at together
ROUNDING = 1e-6  # of a float32 cosine less its prices, where these are at most 1


def match(A: Tensor, B: Tensor, *, dense_below: int = DENSE_BELOW) -> tuple[Tensor, Tensor]:
    """Exact maximum-cosine assignment between the rows of ``A`` [n, d] and ``B`` [m, d].

    Solves the assignment on each row's nearest columns only, then proves or repairs it: from the sparse optimum come dual
    prices u, v, and every pair with cos > u + v joins the candidates until there is none. At that point the dual bound
    equals the total, so no assignment of the dense problem is better (linear-programming duality). The cosine matrix is
    passed over by blocks. Small and rectangular problems go to scipy's dense solver on the whole matrix, and so do those
    where most rows compete for the same columns.

    Returns:
        partner: [n] row of ``B`` for each row of ``A``, −1 for the rows left over where n > m.
        cosine: [n] float32, NaN for those.

    Raises:
        ValueError: not two matrices of one width, empty, NaN or inf in the weights.
    """
    door(dense_below=dense_below)
    A, B = _unit(A, "A"), _unit(B, "B")
    if A.shape[1] != B.shape[1]:
        raise ValueError(f"A has width {A.shape[1]}, B {B.shape[1]}: match rows of the same space (same hook point)")
    if flipped := len(A) > len(B):
        A, B = B, A
    column = None if len(A) < max(dense_below, len(B)) else _proven(A, B)
    if column is None:
        with _float32():
            cosines = (A @ B.T).cpu()
        column = linear_sum_assignment(cosines.numpy(), maximize=True)[1]
    column = torch.from_numpy(column.astype(np.int64))
    best = _cosines(A, B, torch.arange(len(A)), column)
    if not flipped:
        return column, best
    partner, cosine = torch.full((len(B),), -1), torch.full((len(B),), torch.nan)
    partner[column], cosine[column] = torch.arange(len(A)), best
    return partner, cosine


def match_certified(
    A: Tensor, B: Tensor, *, neighbours: int = NEIGHBOURS, rounds: int = 2, progress: bool = True
) -> tuple[Tensor, Tensor, float]:
    """As :func:`match` for dictionaries of one shape [n, d], but stops after ``rounds`` and says how good the result is.

    For any prices no assignment exceeds Σu + Σv + Σ_i max_j (cos_ij − u_i − v_j)₊ (linear-programming duality); the prices
    of a sparse optimum make this close. Best assignment and least bound of all rounds are kept. Memory: both dictionaries
    a few times, the candidates, a block of 256 rows of cosines; 5 GB at n = 131,072, d = 768.

    Returns:
        partner [n], cosine [n], and the gap: how much more any assignment's summed cosine can be, n·1e-6 for the
        rounding of float32 included (divide by n for the mean's).

    Raises:
        ValueError: matrices of unequal shape, empty, NaN or inf; no rounds.
    """
    door(neighbours=neighbours, rounds=rounds)
    A, B = _unit(A, "A"), _unit(B, "B")
    if A.shape != B.shape or rounds < 1:
        raise ValueError(
            f"A is {tuple(A.shape)}, B {tuple(B.shape)}: give dictionaries of one shape, rounds of at least 1"
        )
    best = least = None
    for r in _rounds(A, B, neighbours, rounds, progress):
        bound = r.u.sum() + r.v.sum() + r.most.sum() + len(A) * _rounding(r.u, r.v)
        least = bound if least is None else min(least, bound)
        if best is None or r.own.sum() > best.own.sum():
            best = r
        if not r.violations:
            break
    return torch.from_numpy(best.chosen.astype(np.int64)), torch.from_numpy(best.own).float(), least - best.own.sum()


def _unit(W: Tensor, name: str) -> Tensor:
    if not isinstance(W, (Tensor, np.ndarray)):
        raise ValueError(f"{name}={W!r}: give a matrix with one latent a row")
    W = torch.as_tensor(W).detach().float()
    if W.ndim != 2 or not len(W):
        raise ValueError(f"{name} is {tuple(W.shape)}: give a matrix with one latent a row")
    if not (finite := torch.isfinite(W).all(1)).all():
        raise ValueError(f"{name} has NaN or inf in {int((~finite).sum())} rows: the training diverged, train it again")
    return (W / W.norm(dim=1, keepdim=True).clamp_min(1e-12)).contiguous()  # a zero row has cosine 0 with everything


def _cosines(A: Tensor, B: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """cos of the pairs, float32: always the same for a pair, whoever asks."""
    return search.dots(A, B, row.to(A.device), column.to(A.device)).cpu()


@contextmanager
def _float32() -> Iterator[None]:
    """Products in float32 whatever a GPU would prefer: TF32 errs by 1e-3."""
    tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


def _rounding(u: np.ndarray, v: np.ndarray) -> float:
    return ROUNDING * max(1.0, float(abs(u).max()), float(abs(v).max()))


def _passing(
    A: Tensor, B: Tensor, bias: Tensor, what: str, progress: bool, k: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs from :func:`saeutils.kernels.search.passing`, at most PART at a time."""
    with _float32():
        for row, column, _ in tqdm(search.passing(A, B, bias, k=k), what, disable=not progress, unit=" blocks"):
            yield from zip(row.split(PART), column.split(PART))


class _Round(NamedTuple):
    """An optimal assignment of a sparse problem: ``chosen`` column, ``own`` cosine, prices, and what exceeds u + v."""

    chosen: np.ndarray
    own: np.ndarray
    u: np.ndarray
    v: np.ndarray
    settled: bool
    most: np.ndarray
    violations: int


def _proven(A: Tensor, B: Tensor) -> np.ndarray | None:
    """Column of every row in an optimal assignment of the dense problem, or None if it was not proven in ROUNDS."""
    limit = CONTESTED * len(A)
    for r in _rounds(A, B, NEIGHBOURS, ROUNDS, False, limit):
        if not r.violations:
            return r.chosen
        if not r.settled or r.violations > limit:
            return None
    return None


def _rounds(
    A: Tensor, B: Tensor, neighbours: int, rounds: int, progress: bool, limit: float = np.inf
) -> Iterator[_Round]:
    """Solve on the nearest columns of each row, then again with the pairs above their bound, and so on."""
    n = len(A)
    nothing = torch.zeros(n, device=A.device)
    near = _passing(A, B, nothing, "neighbours", progress, min(neighbours, n))
    known = np.concatenate([(i * n + j).cpu().numpy() for i, j in near])
    known, v = _union(known, np.arange(n) * (n + 1)), np.zeros(n)  # (i, i): a full assignment is possible
    for round in range(rounds):
        row, column = np.divmod(known, n)
        value = _cosines(A, B, torch.from_numpy(row), torch.from_numpy(column)).double().numpy()
        # relative to the last prices all costs are ≥ 0 and 0 where those were right: the solver mends the rest
        chosen = _solve(n, row, column, value - v[column])
        own = value[np.searchsorted(known, np.arange(n) * n + chosen)]
        u, v, settled = _prices(row, column, value, chosen, own)
        keys, most, count = _violations(A, B, u, v, 0.0 if round else MARGIN, progress, limit)
        yield _Round(chosen, own, u, v, settled, most, count)
        known = _union(known, keys)


def _union(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sorted and without repetitions (numpy's own goes by a hash table, slower here)."""
    keys = np.sort(np.concatenate([a, b]))
    return keys[np.r_[True, keys[1:] != keys[:-1]]]


def _violations(
    A: Tensor, B: Tensor, u: np.ndarray, v: np.ndarray, margin: float, progress: bool, limit: float
) -> tuple[np.ndarray, np.ndarray, int]:
    """Of the pairs with cos − u − v above −``margin`` the WORST of each row as keys i·n + j; the most by which a pair of
    each row exceeds its bound, [n], at least 0; how many do (counted no further than past ``limit``).
    """
    row_price, column_price = (torch.from_numpy(p).float().to(A.device) for p in (margin + _rounding(u, v) - u, -v))
    lifted = torch.cat([A, row_price[:, None]], dim=1)  # one more column adds each row's own price
    ones = torch.cat([B, torch.ones_like(B[:, :1])], dim=1)
    keys, most, count = [], np.zeros(len(A)), 0
    for row, column in _passing(lifted, ones, column_price, "proof", progress):
        excess, i, j = _cosines(A, B, row, column).double().numpy(), row.cpu().numpy(), column.cpu().numpy()
        excess -= u[i] + v[j]
        np.maximum.at(most, i, excess)
        if (count := count + int((excess > TIGHT).sum())) > limit:
            break
        order = np.lexsort((-excess, i))
        order = order[excess[order] > TIGHT - margin]
        i, j = i[order], j[order]
        keys.append((i * len(B) + j)[np.arange(len(i)) - np.searchsorted(i, i) < WORST])
    return np.concatenate([*keys, np.empty(0, np.int64)]), most, count


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


def compare(a: SAE, b: SAE) -> pd.DataFrame:
    """Match encoder rows and decoder columns of two SAEs separately (Paulo & Belrose 2025, arXiv:2501.16615).

    One row per latent i of ``a``: ``encoder`` = C^enc_{i,π(i)}, ``decoder`` = C^dec_{i,σ(i)}, ``pi``, ``sigma``, ``same``
    (π(i) = σ(i)).

    Raises:
        ValueError: the SAEs differ in d_in or d_sae; NaN weights.
    """
    door(a=a, b=b)
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
    door(matched=matched)
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
    door(saes=saes)
    if len(saes) < 2:
        raise ValueError("PW-MCC needs at least two SAEs: train another seed")
    pairs = [float(match(a.W_dec, b.W_dec)[1].nanmean()) for a, b in combinations(saes, 2)]
    return float(np.mean(pairs)), pairs
