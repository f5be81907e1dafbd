"""Measures against closed forms and scikit-learn; intervals by what they cover."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from saeutils import metrics


def test_orthogonality_of_random_rows():
    W = torch.randn(3000, 256)
    exact = metrics.orthogonality(W)
    unit = torch.nn.functional.normalize(W, dim=1)
    gram = (unit @ unit.T).abs().fill_diagonal_(0)
    assert exact["mean"] == pytest.approx(float(gram.sum() / (3000 * 2999)), rel=1e-5)
    assert exact["max"] == pytest.approx(float(gram.max()), rel=1e-5)
    assert exact["mean"] == pytest.approx(metrics.random_orthogonality(256), rel=5e-3)
    assert metrics.orthogonality(W, rows=300)["mean"] == pytest.approx(exact["mean"], rel=2e-2)


def test_auroc_equals_scikit_learn():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 5, (200, 7)).astype(float), rng.integers(0, 2, 200)
    expected = [roc_auc_score(labels, column) for column in scores.T]
    assert np.allclose(metrics.auroc(scores, labels), expected)
    with pytest.raises(ValueError, match="both classes"):
        metrics.auroc(scores, np.ones(200))


@pytest.mark.parametrize("n", [3, 5, 8, 40])
def test_intervals_of_means_cover(n):
    draws = np.random.default_rng(0).normal(2.0, 1.0, (2000, n))
    found = [metrics.interval(x) for x in draws]
    assert np.mean([x.low <= 2.0 <= x.high for x in found]) >= 0.93
    pairs = np.random.default_rng(1).normal(0.0, 1.0, (2000, 2, n))
    for paired in (True, False):
        gaps = [metrics.difference(a + 1, b, paired=paired) for a, b in pairs]
        assert np.mean([x.low <= 1.0 <= x.high for x in gaps]) >= 0.93


@pytest.mark.parametrize("seeds, items", [(3, 40), (5, 8), (8, 200), (40, 40)])
def test_intervals_over_seeds_and_items_cover(seeds, items):
    rng, hits = np.random.default_rng(0), 0
    for _ in range(2000):
        x = 2 + rng.normal(0, 0.5, (seeds, 1)) + rng.normal(0, 1, (1, items)) + rng.normal(0, 1, (seeds, items))
        hits += metrics.interval(x).low <= 2 <= metrics.interval(x).high
    assert hits / 2000 >= 0.93


@pytest.mark.parametrize("n", [3, 5, 8, 40])
def test_intervals_of_shares_cover(n):
    """Seeds whose rate varies, each a share of its own 30 items."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(2000):
        shares = rng.binomial(30, rng.beta(16, 4, n)) / 30
        hits += metrics.interval(shares, items=30 * n).low <= 0.8 <= metrics.interval(shares, items=30 * n).high
    assert hits / 2000 >= 0.93


def test_intervals_of_a_median_cover():
    rng = np.random.default_rng(0)
    found = [metrics.interval(rng.normal(2.0, 1.0, 40), "median") for _ in range(60)]
    assert np.mean([x.low <= 2.0 <= x.high for x in found]) >= 0.87  # .95 less three standard errors


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 6), st.integers(2, 30), st.integers(0, 2**32 - 1))
def test_an_interval_over_seeds_and_items_is_wider_than_over_items(seeds, items, seed):
    x = np.random.default_rng(seed).normal(size=(seeds, 1)) + np.random.default_rng(seed + 1).normal(size=(seeds, items))
    both, one, other = metrics.interval(x), metrics.interval(x.mean(0)), metrics.interval(x.mean(1))
    for alone in (one, other):
        assert both.low <= alone.low + 1e-9 and both.high >= alone.high - 1e-9
    assert both.here == pytest.approx(one.here)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.integers(1, 500))
def test_a_share_is_never_narrower_than_its_binomial_interval(shares, items):
    low, high = metrics.wilson(float(np.mean(shares)), items)
    found = metrics.interval(shares, items=items)
    assert found.low <= low + 1e-12 and found.high >= high - 1e-12


def test_intervals_equal_scipys():
    x, y = np.random.default_rng(0).normal(size=(2, 9))
    low, high = stats.ttest_1samp(x, 0).confidence_interval()
    assert metrics.interval(x) == pytest.approx((x.mean(), low, high))
    low, high = stats.ttest_rel(x, y).confidence_interval()
    assert metrics.difference(x, y)[1:] == pytest.approx((low, high))
    low, high = stats.ttest_ind(x, y[:6], equal_var=False).confidence_interval()
    assert metrics.difference(x, y[:6], paired=False)[1:] == pytest.approx((low, high))
    low, high = stats.binomtest(7, 30).proportion_ci(method="wilson")
    assert metrics.wilson(7 / 30, 30) == pytest.approx((low, high))
    z = np.random.default_rng(0).normal(size=40)
    options = dict(n_resamples=1999, method="BCa", vectorized=True, rng=np.random.default_rng(0))
    found = stats.bootstrap((z,), np.median, **options).confidence_interval
    assert metrics.interval(z, "median")[1:] == pytest.approx((found.low, found.high), abs=0.15)


def test_intervals_that_cannot_be_given():
    assert np.isnan(metrics.interval([1.0]).low) and np.isnan(metrics.interval(np.arange(10.0), "median").low)
    assert metrics.interval(np.ones(30), "median") == (1, 1, 1)
    for values, statistic in (([0.5, 1.2], "mean"), ([0.5, 0.2], "median"), ([[0.5], [0.2]], "mean")):
        with pytest.raises(ValueError, match="of how many things each value is a share"):
            metrics.interval(values, statistic, items=10)
    with pytest.raises(ValueError, match="unknown statistic 'mode'"):
        metrics.interval(np.arange(30.0), "mode")


def test_differences_of_other_statistics_are_paired_or_not():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 5, 40)
    paired = metrics.difference(base + 1 + rng.normal(0, 0.1, 40), base, lambda x: float(np.quantile(x, 0.75)))
    apart = metrics.difference(base + 1, rng.normal(0, 5, 30), "median", paired=False)
    assert 0 < paired.low < paired.here < paired.high < 2 and apart.high - apart.low > paired.high - paired.low


def test_repetition_counts_pairs_of_tokens():
    assert metrics.repetition([5, 5, 5, 5, 5]) == 0.75 and metrics.repetition([1, 2, 3, 1]) == 0
    assert metrics.repetition([1, 2, 1, 2]) == pytest.approx(1 / 3) and metrics.repetition([]) == metrics.repetition([7]) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fvu_is_summed_in_float32(dtype):
    x = 3 * torch.randn(2000, 640, generator=torch.Generator().manual_seed(0))
    assert metrics.fvu(x.to(dtype), (x + 0.1).to(dtype)) == pytest.approx(metrics.fvu(x, x + 0.1), rel=0.1)
    y = x[:, :64] / 3 + 10
    assert metrics.fvu(y.to(dtype), y.to(dtype) * 1.0) == 0
    with pytest.raises(ValueError, match="5 rows of variance 0: there is nothing to explain"):
        metrics.fvu(torch.ones(5, 3), torch.zeros(5, 3))


def test_one_row_has_no_other_to_be_orthogonal_to():
    assert np.isnan(metrics.orthogonality(torch.ones(1, 4))["mean"])
