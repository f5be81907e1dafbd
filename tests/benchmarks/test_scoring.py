"""Scoring all latents: AUROC of each against labels, and the strongest texts of each, beside the obvious ways.

Those are timed on 256 latents and scaled up.
"""

import numpy as np
import pytest
from scipy import sparse
from sklearn.metrics import roc_auc_score

from saeutils.analysis.features import LatentTable
from saeutils.metrics import auroc

LATENTS, TEXTS, TOKENS, PART = 16_384, 2000, 40, 256


@pytest.fixture(scope="module")
def judged():
    """Scores [texts, latents], one in twenty not 0, and labels [texts]."""
    rng = np.random.default_rng(0)
    scores = rng.random((TEXTS, LATENTS), np.float32)
    return np.where(rng.random((TEXTS, LATENTS), np.float32) < 0.05, scores, 0), rng.random(TEXTS) < 0.5


@pytest.fixture(scope="module")
def table():
    shape = (TEXTS * TOKENS, LATENTS)
    acts = sparse.random_array(shape, density=0.004, format="csc", dtype=np.float32, rng=np.random.default_rng(1))
    doc = np.repeat(np.arange(TEXTS), TOKENS)
    return LatentTable(acts, doc, doc, TEXTS)


@pytest.mark.parametrize("who", ["ours", "scikit-learn, a latent at a time"])
def test_auroc(measure, judged, who):
    scores, labels = judged
    row = f"AUROC of {LATENTS:,} latents on {TEXTS:,} texts"
    if who == "ours":
        measure("scoring", row, who, lambda: auroc(scores, labels))
    else:  # one latent at a time: a part of them, its time scaled up
        part = scores[:, :PART]
        loop = lambda: [roc_auc_score(labels, part[:, i]) for i in range(PART)]  # noqa: E731
        measure("scoring", row, who, loop, per=PART / LATENTS)
        assert np.allclose(loop(), auroc(part, labels))


@pytest.mark.parametrize("who", ["ours", "argsort of dense activations"])
def test_top_texts(measure, table, who):
    row = f"strongest texts of {LATENTS:,} latents, {TEXTS * TOKENS:,} tokens"
    if who == "ours":
        measure("scoring", row, who, lambda: [table.top_docs(i) for i in range(LATENTS)])
    else:
        part = table.acts[:, :PART].toarray().reshape(TEXTS, TOKENS, PART)
        measure("scoring", row, who, lambda: np.argsort(-part.max(1), axis=0)[:8], per=PART / LATENTS)
