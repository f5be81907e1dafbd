"""Matching against scipy's dense solver; stability measures on dictionaries whose answer is known."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from scipy.optimize import linear_sum_assignment

from saeutils.analysis import matching
from saeutils.analysis.matching import compare, match, match_certified, pw_mcc, stability


def _dictionaries(kind, n, m, d, seed):
    g = torch.Generator().manual_seed(seed)
    A, B = torch.randn(n, d, generator=g), torch.randn(m, d, generator=g)
    if kind == "structured":  # some rows found again, at various distances, in another order
        shared = min(n, m) * 2 // 3
        noise = torch.rand(shared, 1, generator=g) * 2
        B[:shared] = A[torch.randperm(n, generator=g)[:shared]] + noise * B[:shared]
    elif kind == "tied":  # few distinct directions, many copies, some zero rows
        A, B = A[torch.randint(3, (n,), generator=g) % n], B[torch.randint(3, (m,), generator=g) % m]
        A[: n // 4] = 0
        B[: min(n, m) // 2] = A[: min(n, m) // 2]
    elif kind == "signed":
        B[: min(n, m)] = -A[: min(n, m)]
    return A, B


def _best(A, B):
    unit = [W / W.norm(dim=1, keepdim=True).clamp_min(1e-12) for W in (A, B)]
    cosines = (unit[0] @ unit[1].T).double().numpy()
    return cosines[linear_sum_assignment(cosines, maximize=True)].sum()


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["random", "structured", "tied", "signed"]), n=st.integers(1, 120), m=st.integers(1, 120),
    d=st.integers(1, 20), seed=st.integers(0, 999), sparse=st.booleans(),
)  # fmt: skip
def test_total_equals_scipy(kind, n, m, d, seed, sparse):
    A, B = _dictionaries(kind, n, m, d, seed)
    partner, cosine = match(A, B, dense_below=0 if sparse else 10_000)
    matched = partner >= 0
    assert int(matched.sum()) == min(n, m) == int(cosine.isfinite().sum())
    assert len(partner[matched].unique()) == min(n, m)  # nobody is taken twice
    expected = torch.nn.functional.cosine_similarity(A[matched], B[partner[matched]], eps=1e-12)
    assert torch.allclose(cosine[matched], expected, atol=1e-5)
    assert float(cosine[matched].double().sum()) == pytest.approx(_best(A, B), abs=2e-5)


@pytest.mark.parametrize("kind", ["random", "structured", "tied"])
def test_sparse_path_is_exact_where_it_is_used(kind):
    A, B = _dictionaries(kind, 1500, 1500, 64, 0)
    assert float(match(A, B)[1].double().sum()) == pytest.approx(_best(A, B), abs=1e-4)


def test_a_permutation_is_found():
    A = torch.randn(1200, 32, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(1200)
    partner, cosine = match(A, A[order])
    assert torch.equal(order[partner], torch.arange(1200)) and cosine.min() > 0.999


def _sae(n=64, d=16, seed=0):
    sae = StandardSAE(StandardSAEConfig(d_in=d, d_sae=n))
    g = torch.Generator().manual_seed(seed)
    sae.W_dec.data = torch.randn(n, d, generator=g)
    sae.W_enc.data = torch.randn(d, n, generator=g)
    return sae


def test_compare_and_stability():
    a, b = _sae(), _sae()
    order = torch.randperm(64)
    b.W_dec.data, b.W_enc.data = a.W_dec.data[order], a.W_enc.data[:, order]
    same = compare(a, b)
    assert stability(same) == {
        "pi = sigma": 1.0,
        "decoder": pytest.approx(1),
        "encoder": pytest.approx(1),
        "> .7": 1.0,
        "> .9": 1.0,
    }
    b.W_enc.data[:, [0, 1]] = b.W_enc.data[:, [1, 0]]  # encoder and decoder now disagree about two latents
    assert stability(compare(a, b))["pi = sigma"] == pytest.approx(62 / 64)
    mean, pairs = pw_mcc([a, b, _sae(seed=1)])
    assert len(pairs) == 3 and pairs[0] == pytest.approx(1) and mean == pytest.approx(np.mean(pairs))


def test_bad_input():
    with pytest.raises(ValueError, match="d_sae is 64 and 32: stability compares SAEs of one shape"):
        compare(_sae(), _sae(n=32))
    with pytest.raises(ValueError, match="d_in is 16 and 8"):
        compare(_sae(), _sae(d=8))
    with pytest.raises(ValueError, match="A has width 4, B 5"):
        match(torch.ones(3, 4), torch.ones(3, 5))
    with pytest.raises(ValueError, match="B has NaN or inf in 1 rows"):
        match(torch.ones(2, 4), torch.tensor([[1.0] * 4, [float("nan")] * 4]))
    with pytest.raises(ValueError, match="give a matrix"):
        match(torch.ones(0, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match="at least two SAEs"):
        pw_mcc([_sae()])


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["random", "structured", "tied", "signed"]), n=st.integers(1, 120), d=st.integers(1, 20),
    seed=st.integers(0, 999), neighbours=st.integers(1, 8), rounds=st.integers(1, 6),
)  # fmt: skip
def test_certified_matching_is_within_its_gap(kind, n, d, seed, neighbours, rounds):
    A, B = _dictionaries(kind, n, n, d, seed)
    partner, cosine, gap = match_certified(A, B, neighbours=neighbours, rounds=rounds, progress=False)
    assert sorted(partner.tolist()) == list(range(n))
    assert torch.allclose(cosine, torch.nn.functional.cosine_similarity(A, B[partner], eps=1e-12), atol=1e-5)
    total, best = float(cosine.double().sum()), _best(A, B)
    assert total - 1e-4 <= best <= total + gap + 1e-5


def test_certified_matching_of_dictionaries_closes_its_gap():
    A, B = _dictionaries("structured", 1500, 1500, 64, 0)
    _, cosine, gap = match_certified(A, B, rounds=6, progress=False)
    assert gap < 1e-2 and float(cosine.double().sum()) == pytest.approx(_best(A, B), abs=gap + 1e-3)
    with pytest.raises(ValueError, match="dictionaries of one shape"):
        match_certified(A, B[:-1])


@pytest.mark.parametrize("n", [20, 1500], ids=["dense", "sparse"])
def test_tf32_is_off_while_cosines_are_taken_and_back_afterwards(n, monkeypatch):
    seen, product = [], torch.Tensor.__matmul__

    def noted(a, b):
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", noted)
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **kw: (seen.append(torch.backends.cuda.matmul.allow_tf32), addmm(*a, **kw))[1])
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    try:
        match(*_dictionaries("random", n, n, 64, 0))
        assert seen and not any(seen) and torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_a_block_of_many_pairs_is_looked_at_in_parts(monkeypatch):
    A, B = _dictionaries("structured", 1500, 1500, 64, 0)
    whole = match(A, B)
    monkeypatch.setattr(matching, "PART", 1000)
    assert all(torch.equal(a, b) for a, b in zip(match(A, B), whole))
