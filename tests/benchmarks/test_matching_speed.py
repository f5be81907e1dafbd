"""Exact matching of two dictionaries: scipy's dense solver, lapx's, ours, and one cosine matrix, in one run.

Dictionaries like two seeds of an SAE; where all rows share a direction and compete, ours hands over to scipy.
"""

import time

import lap
import pytest
import torch
from conftest import Peak
from scipy.optimize import linear_sum_assignment

from saeutils.analysis.matching import match, match_certified

D = 768


def _pair(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Half of the rows found again at various distances in another order, half new: like two seeds of an SAE."""
    g = torch.Generator().manual_seed(0)
    A, fresh = (torch.nn.functional.normalize(torch.randn(n, D, generator=g), dim=1) for _ in range(2))
    B = A[torch.randperm(n, generator=g)] + 3 * torch.rand(n, 1, generator=g) * fresh
    B[: n // 2] = torch.randn(n // 2, D, generator=g)
    return A, torch.nn.functional.normalize(B, dim=1)


KINDS = {
    "ours": match,
    "lapx": lambda A, B: lap.lapjvs((-A @ B.T).numpy(), return_cost=False),
    "scipy": lambda A, B: linear_sum_assignment((A @ B.T).numpy(), maximize=True),
}


@pytest.mark.parametrize("who", KINDS)
@pytest.mark.parametrize("n", [4096, 8192, 18_432])
def test_match(measure, n, who):
    A, B = _pair(n)
    out = torch.zeros(n, n)
    floor = lambda: torch.mm(A, B.T, out=out)  # noqa: E731
    measure("match", f"n = {n:,}", who, lambda: KINDS[who](A, B), rounds=1 if n > 8192 else 3, floor=floor)
    if who == "ours" and n == 4096:
        cosines = (A @ B.T).double().numpy()
        best = cosines[linear_sum_assignment(cosines, maximize=True)].sum()
        assert float(match(A, B)[1].double().sum()) == pytest.approx(best, abs=1e-3)


def test_match_of_large_dictionaries(record):
    n = 131_072
    A, B = _pair(n)
    start = time.perf_counter()
    with Peak() as peak:
        gap = match_certified(A, B, progress=False)[2]
    row = f"n = {n:,}, mean cosine proven within {gap / n:.1e} of the best (1e-6 of it for float32)"
    record("match", row, "ours", time.perf_counter() - start, peak.gib)
