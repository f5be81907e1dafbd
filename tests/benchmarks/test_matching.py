"""Exact matching of two dictionaries: scipy's dense solver, lapx's, ours, and one cosine matrix, in one run."""

import lap
import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from saeutils.matching import match

D = 768
TIMES: dict[tuple[int, str], float] = {}


def _pair(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Half of the rows found again at various distances in another order, half new: like two seeds of an SAE."""
    g = torch.Generator().manual_seed(0)
    A, fresh = (torch.nn.functional.normalize(torch.randn(n, D, generator=g), dim=1) for _ in range(2))
    B = A[torch.randperm(n, generator=g)] + 3 * torch.rand(n, 1, generator=g) * fresh
    B[: n // 2] = torch.randn(n // 2, D, generator=g)
    return A, torch.nn.functional.normalize(B, dim=1)


KINDS = {
    "one cosine matrix": lambda A, B: A @ B.T,
    "ours": match,
    "lapx lapjvs": lambda A, B: lap.lapjvs(-(A @ B.T).numpy(), return_cost=False),
    "scipy": lambda A, B: linear_sum_assignment((A @ B.T).numpy(), maximize=True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [4096, 8192, 18_432])
def test_match(benchmark, n, kind):
    torch.set_num_threads(2)
    pair = _pair(n)
    result = benchmark.pedantic(KINDS[kind], args=pair, rounds=1 if n > 8192 else 3, warmup_rounds=0)
    TIMES[n, kind] = benchmark.stats["median"]
    if kind == "ours" and n == 4096:
        cosines = (pair[0] @ pair[1].T).double().numpy()
        best = cosines[linear_sum_assignment(cosines, maximize=True)].sum()
        assert float(result[1].double().sum()) == pytest.approx(best, abs=1e-3)


def test_table():
    for n in sorted({n for n, _ in TIMES}):
        ours = TIMES[n, "ours"]
        print(
            f"\nn = {n:,}: "
            + ", ".join(
                f"{k} {np.round(TIMES[n, k], 2)} s ({TIMES[n, k] / ours:.2f}×)" for k in KINDS if (n, k) in TIMES
            )
        )
