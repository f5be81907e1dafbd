"""Directions that are zero, double or dependent, columns that are constant, sides that are empty: the right value, or a sentence."""

import numpy as np
import pytest
import torch

from saeutils import metrics
from saeutils.analysis import matching, quality
from saeutils.lm import batches
from saeutils.saes import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig, initializers

Y = np.array([0, 1] * 20)


def test_constant_columns_know_nothing_and_nan_is_refused():
    assert metrics.auroc(np.c_[np.ones(40), Y], Y).tolist() == [0.5, 1.0]
    with pytest.raises(ValueError, match="AUROC: scores has NaN or inf"):
        metrics.auroc(np.full(40, np.nan), Y)
    for labels in (np.zeros(40), np.ones(40)):
        with pytest.raises(ValueError, match=r"40 labels, .* of them positive: both classes are needed"):
            metrics.auroc(np.ones(40), labels)


def test_probes_on_constant_columns_and_on_one_class():
    w, b = quality.linear_probe(np.ones((40, 3)), Y)
    assert np.isfinite(w).all() and np.isfinite(b)
    w, b = quality.linear_probe(np.zeros((40, 3)), Y)
    assert np.isfinite(w).all() and np.isfinite(b)
    with pytest.raises(ValueError, match="linear probe: 40 labels, 0 of them positive"):
        quality.linear_probe(np.ones((40, 3)), np.zeros(40))
    z, train = np.c_[Y, np.zeros(40), np.ones(40)].astype(float), np.arange(40) < 20
    assert quality.k_sparse_probing(z, Y, train, 3) == 1.0
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"k={k}"):
            quality.k_sparse_probing(z, Y, train, k)
    with pytest.raises(ValueError, match="test rows: 0 labels"):
        quality.k_sparse_probing(z, Y, np.ones(40, bool), 1)


def test_identical_double_and_zero_rows_are_matched_one_to_one():
    A = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    partner, cosine = matching.match(A, A[torch.randperm(40)])
    assert sorted(partner.tolist()) == list(range(40)) and torch.allclose(cosine, torch.ones(40), atol=1e-6)
    same = A[:1].expand(40, -1)
    partner, cosine = matching.match(same, same)
    assert sorted(partner.tolist()) == list(range(40)) and torch.allclose(cosine, torch.ones(40), atol=1e-6)
    partner, cosine = matching.match(torch.zeros(40, 8), A)
    assert sorted(partner.tolist()) == list(range(40)) and (cosine == 0).all()


@pytest.mark.parametrize("n", [1200])
def test_dictionaries_of_many_equal_rows_are_matched_on_the_sparse_path_too(n):
    A = torch.randn(n // 3, 16, generator=torch.Generator().manual_seed(0)).repeat(3, 1)
    partner, cosine = matching.match(A, A.flip(0), dense_below=8)
    assert sorted(partner.tolist()) == list(range(n)) and torch.allclose(cosine, torch.ones(n), atol=1e-5)


def test_medians_of_equal_rows_and_of_none():
    x = torch.ones(5, 3) * 2
    assert torch.allclose(initializers.geometric_median(x), x[0])
    with pytest.raises(ValueError, match="at least one row"):
        initializers.geometric_median(x[:0])
    with pytest.raises(ValueError, match="with NaN or inf"):
        initializers.geometric_median(x * float("nan"))


def test_scales_of_rows_that_are_all_zero():
    for kind in ("scale", "rms"):
        with pytest.raises(ValueError, match="nothing to scale"):
            batches.factor(torch.zeros(5, 3), kind)


def test_a_dictionary_with_zero_and_double_rows_has_its_cosines():
    W = torch.cat([torch.eye(3), torch.zeros(1, 3), torch.eye(3)[:1]])
    found = metrics.orthogonality(W)
    assert found["max"] == pytest.approx(1.0) and found["mean"] == pytest.approx(2 / 20)
    sae = SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(d_in=3, d_sae=5, k=2))
    with torch.no_grad():
        sae.W_dec.copy_(W)
    initializers.tie(sae)
    assert torch.isfinite(sae.W_enc).all() and (sae.W_enc[:, 3] == 0).all()


def test_concepts_without_activation_are_nan_and_do_not_disturb_others():
    found = metrics.fragmentation(torch.tensor([[0.0, 0], [3, 3]]), torch.tensor([0, 1]))
    assert np.isnan(found["EffFeat"][0]) and found["EffFeat"][1] == pytest.approx(2)
