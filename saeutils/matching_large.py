"""One-to-one matching of dictionaries whose cosine matrix does not fit in memory, with a bound on what is lost."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from saeutils.matching import _prices, _solve, _unit

ROUNDING = 1e-6  # of a float32 cosine less its prices


def match_certified(
    A: Tensor, B: Tensor, *, neighbours: int = 24, rounds: int = 2, block: int = 1024, progress: bool = True
) -> tuple[Tensor, Tensor, float]:
    """Maximum-cosine assignment between the rows of ``A`` and ``B`` [n, d] on sparse candidates, and how good it must be.

    Candidates are each row's ``neighbours`` nearest columns (and (i, i), so that an assignment exists). For any prices v
    and u = cos of the chosen pair − v, no assignment of the dense problem exceeds Σu + Σv + Σ_i max_j (cos_ij − u_i −
    v_j)₊ (linear-programming duality); the prices of the sparse optimum make this close. Pairs above their bound join the
    candidates and the problem is solved again, ``rounds`` times in all; the best assignment and the least bound are kept.
    Each round passes once over the cosines, ``block`` rows at a time: about 3·4·n·block bytes, never the matrix.

    Returns:
        partner [n], cosine [n], and the gap: how much more any assignment's summed cosine can be, n·1e-6 for the
        rounding of float32 included (divide by n for the mean's).

    Raises:
        ValueError: matrices of unequal shape, empty, NaN or inf; no rounds.
    """
    A, B = _unit(A, "A"), _unit(B, "B")
    if A.shape != B.shape or rounds < 1:
        raise ValueError(
            f"A is {tuple(A.shape)}, B {tuple(B.shape)}: give dictionaries of one shape, rounds of at least 1"
        )
    n, best, least = len(A), -np.inf, np.inf
    with tqdm(total=(rounds + 1) * n, desc="matching", disable=not progress) as bar:
        near = torch.cat([cosines.topk(min(neighbours, n)).indices.cpu() for _, cosines in _blocks(A, B, block, bar)])
        known = np.union1d((np.arange(n)[:, None] * n + near.numpy()).ravel(), np.arange(n) * (n + 1))
        for _ in range(rounds):
            row, column = np.divmod(known, n)
            value = _at(A, B, row, column)
            chosen = _solve(n, row, column, value)
            own = value[np.searchsorted(known, np.arange(n) * n + chosen)]
            u, v, _ = _prices(row, column, value, chosen, own)
            if own.sum() > best:
                best, partner, cosine = (
                    own.sum(),
                    torch.from_numpy(chosen.astype(np.int64)),
                    torch.from_numpy(own).float(),
                )
            u32, v32 = (torch.from_numpy(p).float().to(A.device) for p in (u, v))
            bound, new = u.sum() + v.sum() + n * ROUNDING, []
            for at, over in _blocks(A, B, block, bar):
                excess, j = over.sub_(v32).sub_(u32[at : at + block, None]).topk(min(4, n))  # [block, 4]
                bound += float(excess[:, 0].clamp_min(0).double().sum())
                i = torch.arange(at, at + len(over), device=A.device)[:, None].expand_as(j)
                new.append((i * n + j)[excess > ROUNDING].cpu().numpy())
            least = min(least, bound)
            if not len(new := np.concatenate(new)):
                break
            known = np.union1d(known, new)
    return partner, cosine, float(least - best)


def _blocks(A: Tensor, B: Tensor, block: int, bar: tqdm) -> Iterator[tuple[int, Tensor]]:
    """(first row, cosines [block, n]), in float32 whatever a GPU would prefer: TF32 errs by 1e-3."""
    tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    try:
        for at in range(0, len(A), block):
            yield at, A[at : at + block] @ B.T
            bar.update(min(block, len(A) - at))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


def _at(A: Tensor, B: Tensor, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """cos of the pairs (row, column), float64; at most 256 MB at a time."""
    size = max(1, 2**24 // A.shape[1])
    rows, columns = (torch.from_numpy(np.asarray(i, np.int64)).split(size) for i in (row, column))
    return torch.cat([(A[i] * B[j]).sum(1).double().cpu() for i, j in zip(rows, columns)]).numpy()
