"""What bfloat16 bounds let through is what the dense float32 product has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saeutils.kernels import search, sparse


def problem(batch, n, d, seed, spread):
    """Rows and latents whose norms differ by up to ``spread`` decades, some of them 0; a bias of either sign."""
    g = torch.Generator().manual_seed(seed)
    x, W = torch.randn(batch, d, generator=g), torch.randn(n, d, generator=g)
    x, W = (m * 10 ** (spread * torch.rand(len(m), 1, generator=g)) for m in (x, W))
    x[torch.rand(batch, generator=g) < 0.1] = 0
    W[torch.rand(n, generator=g) < 0.1] = 0
    return x, W, 0.1 * d**0.5 * torch.randn(n, generator=g)


def found(blocks, x, W):
    row, column, value = (torch.cat(p).cpu() for p in zip(*blocks))
    assert torch.equal(row, row.sort().values)
    out = torch.zeros(len(x), len(W)).index_put((row, column), value)
    assert int((out != 0).sum()) == len(row)
    return out


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 600), n=st.integers(1, 80), d=st.integers(1, 40), seed=st.integers(0, 999),
    spread=st.sampled_from([0.0, 1.0, 3.0]), k=st.sampled_from([None, 1, 3, 20]), shift=st.sampled_from([0.0, -2.0, -1e6]),
    size=st.sampled_from([1.0, 1e-12, 1e-24]), floors=st.booleans(),
)  # fmt: skip
def test_bounded_equals_dense(batch, n, d, seed, spread, k, shift, size, floors):
    x, W, bias = problem(batch, n, d, seed, spread)
    x, bias = x * size, (bias + shift) * size
    k = k and min(k, n)
    floor = bias.roll(1) if floors and not k else torch.zeros(n)
    pre = x.double() @ W.double().T + bias
    dense = torch.where(pre > floor, pre, 0.0)
    if k:
        dense = torch.zeros_like(dense).scatter(1, (top := dense.relu().topk(k, dim=1)).indices, top.values)
    scale = x.double().norm(dim=1)[:, None] * W.norm(dim=1) + bias.abs() + floor.abs()
    for search_ in (search._bounded, search._dense):
        ours = found(search_(x, W, bias, floor, k), x, W)
        apart = (ours - dense).abs() > 2e-6 * scale
        edge = (pre - floor).abs() <= 2e-6 * scale  # passing or not, by rounding
        assert not (apart & ~edge).any()


@pytest.mark.parametrize("k", [None, 5])
def test_threads_find_what_one_finds(k):
    x, W, bias = problem(8 * search.ROWS + 77, 60, 40, 0, 1.0)
    outcomes, threads = [], torch.get_num_threads()
    for n in (1, 2):
        torch.set_num_threads(n)
        with torch.no_grad():  # as in a forward pass; threads have modes of their own
            blocks = list(search._bounded(x, W.requires_grad_(), bias, torch.zeros(60), k))
        outcomes.append([torch.cat(p) for p in zip(*blocks)])
        assert torch.get_num_threads() == n
    torch.set_num_threads(threads)
    for one, two in zip(*outcomes):
        assert torch.equal(one, two) and not two.requires_grad


def test_what_is_not_finite_is_searched_densely():
    x, W, bias = problem(600, 80, 40, 0, 0.0)
    assert search._worthwhile(x.repeat(40, 8), W.repeat(40, 8), bias) == search.quick_bfloat16()
    for i in range(3):
        broken = [x.repeat(40, 8), W.repeat(40, 8), bias.clone()]
        broken[i].view(-1)[3] = -torch.inf
        assert not search._worthwhile(*broken)


def test_ties_give_k_of_them():
    x, W = torch.ones(5, 4), torch.ones(70, 4)
    out = found(search._bounded(x, W, torch.zeros(70), torch.zeros(70), 7), x, W)
    assert ((out > 0).sum(1) == 7).all()


def test_bound_holds_where_rounding_is_worst():
    """Entries just above half a step of bfloat16, all of one sign: every rounding goes the same way."""
    x = torch.full((3, 2048), 1 + 2.0**-8 + 2.0**-20)
    W = torch.cat([x, -x, x * 0.999])
    bias = -(x[:1].double() @ W.double().T)[0].float() * (1 - 1e-4)  # what is left of it decides
    ((_row, column, value),) = search._bounded(x, W, bias, torch.zeros(9), None)
    assert sorted(set(column.tolist())) == [0, 1, 2, 6, 7, 8] and (value > 0).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_searches_densely():
    x, W, bias = (t.cuda() for t in problem(300, 70, 16, 0, 0.0))
    out = found(search.passing(x, W, bias, k=5), x.cpu(), W.cpu())
    assert (out > 0).sum(1).max() <= 5


def test_dots_are_dots():
    x, W = torch.randn(9, 7), torch.randn(20, 7)
    row, column = torch.randint(9, (50,)), torch.randint(20, (50,))
    torch.testing.assert_close(search.dots(x, W, row, column), (x[row] * W[column]).sum(1))
    assert len(search.dots(x, W, row[:0], column[:0])) == 0


def test_dots_of_pairs_that_lie_apart_in_memory():
    x, W = torch.randn(9, 7), torch.randn(20, 7)
    pairs = torch.stack([torch.randint(9, (50,)), torch.randint(20, (50,))], dim=1)  # [pair, 2]: each column has stride 2
    torch.testing.assert_close(search.dots(x, W, pairs[:, 0], pairs[:, 1]), (x[pairs[:, 0]] * W[pairs[:, 1]]).sum(1))


def test_a_sparse_product_does_not_read_what_its_memory_held_before(monkeypatch):
    row, column, entries = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 2]), torch.tensor([1.0, 2.0, 3.0])
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape: torch.full(shape, float("nan")))
    times = sparse.transposed(row, column, (2, 4))
    dense = torch.zeros(2, 4).index_put((row, column), entries)
    assert torch.equal(times(entries, torch.eye(2)), dense.T)
