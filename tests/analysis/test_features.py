"""Latent tables, token effects and shaded texts on a real LM; widgets and plots build."""

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from matplotlib import pyplot as plt
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

from saeutils.analysis import features
from saeutils.lm import activations, models
from saeutils.notebook import plots

HOOK = "blocks.2.hook_resid_post"
TEXTS = ["The cat sat on the mat.", "<b>Bold</b> & brave, she left.", "It rained in Paris all day long."]


@pytest.fixture(scope="module")
def lm():
    return models.load_lm("gemma-3-270m", layers=3, dtype=torch.float32)


@pytest.fixture(scope="module")
def sae():
    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=640, d_sae=128, k=8))
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(128, 640), dim=1))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


@pytest.fixture(scope="module")
def data():
    return Dataset.from_list([{"text": t} for t in TEXTS])


@pytest.fixture(scope="module")
def table(sae, data):
    acts = activations.collect("gemma-3-270m", HOOK, data, context=32, dtype=torch.float32)
    return features.latent_table(acts, sae, len(data))


def test_table_equals_encoding_by_hand(lm, sae, table):
    with torch.no_grad():
        x = lm.run_with_cache(TEXTS[2], names_filter=[HOOK])[1][HOOK][0, 1:]
        expected = sae.encode(x).detach().numpy()
    inside = table.doc == 2
    assert np.allclose(table.acts.toarray()[inside], expected, atol=1e-2 * expected.max())
    top = table.max_per_doc().toarray()
    assert np.allclose(top[2], expected.max(0), atol=1e-2 * expected.max())
    latent = int(expected.max(0).argmax())
    assert table.top_docs(latent)[0] == int(top[:, latent].argmax())


def test_top_texts_are_the_strongest_documents_in_reading_order(table):
    words = np.array([str(t) for t in table.token], dtype=object)
    latent = int(np.diff(table.acts.indptr).argmax())
    found = table.top_texts(latent, words, n=2)
    values = table.of(latent)
    assert [max(a for _, a in text) for text in found] == sorted(
        (values[table.doc == d].max() for d in range(3)), reverse=True
    )[:2]
    for text, doc in zip(found, table.top_docs(latent, 2)):
        inside = table.doc == doc
        assert [t for t, _ in text] == words[inside].tolist() and np.allclose([a for _, a in text], values[inside])


def test_promoted_is_the_change_of_logits(lm):
    """Small steps along a direction before the final norm move the centred logits along ``promoted``."""
    x = lm.run_with_cache("The cat", names_filter=[HOOK])[1][HOOK][0, -1]
    direction = torch.nn.functional.normalize(torch.randn(640, generator=torch.Generator().manual_seed(0)), dim=0)
    norm, head = lm.original_model.model.norm, lm.original_model.get_output_embeddings()
    with torch.no_grad():
        scale = x.norm() / 640**0.5
        gain = (norm(direction[None, None] * 1e3) / (direction * 1e3 / (1e3 / 640**0.5)))[0, 0]  # the norm's γ, by use
        expected = head(direction * gain)
    got = features.promoted(lm, direction)
    assert scale > 0 and torch.allclose(got, expected - expected.mean(), atol=1e-2 * float(expected.abs().max()))


def test_promoting_agrees_with_promoted(lm, sae):
    token = 12_345
    scores = features.promoting(lm, sae, token)
    best = int(scores.argmax())
    assert scores[best] == pytest.approx(float(features.promoted(lm, sae.W_dec[best].detach())[token]), rel=1e-3)
    assert features.token_table(lm, sae.W_dec[0].detach(), 5).shape == (5, 2)


def test_shaded_text_is_escaped(lm, sae, table):
    html = features.shaded(table, lm.tokenizer, 0, docs=[1])
    assert "<b>" not in html and "&lt;" in html and "&amp;" in html


def test_cropped_texts_keep_their_peak_and_say_where_they_are_cut(lm, table):
    latent = int(np.argmax(table.max_per_doc().toarray().max(0)))
    doc = table.top_docs(latent, 1)[0]
    values = table.of(latent)[slice(*table.edges[doc : doc + 2])]
    html = features.shaded(table, lm.tokenizer, latent, n=1, around=1)
    kept = range(max(0, values.argmax() - 1), min(len(values), values.argmax() + 2))
    assert html.count("<span") == len(kept) + (kept.start > 0) + (kept.stop < len(values))
    assert f'title="{values.max():.3g}"' in html and html.count("…") == (kept.start > 0) + (kept.stop < len(values))
    assert features.shaded(table, lm.tokenizer, latent, n=1, around=10_000) == features.shaded(table, lm.tokenizer, latent, n=1)


def test_bad_input(table, sae):
    with pytest.raises(ValueError, match="latent=128: the dictionary has 0 to 127"):
        table.of(128)
    other = TopKSAE(TopKSAEConfig(d_in=32, d_sae=64, k=4))
    acts = activations.collect("gemma-3-270m", HOOK, Dataset.from_list([{"text": "Hello there."}]), dtype=torch.float32)
    with pytest.raises(ValueError, match="activations have d=640, the SAE expects d_in=32"):
        features.latent_table(acts, other, 1)


def test_plots_save_numbers_beside_pictures(tmp_path):
    frame = pd.DataFrame({"x": [1, 2, 1, 2], "y": [1.0, 2.0, 2.0, 3.0], "arm": ["a", "a", "b", "b"]})
    fig, (ax,) = plots.panels(1)
    plots.lines(ax, frame, "x", "y", "arm", low="y", high="y")
    plots.bars(ax, {"a": (1.0, 0.5, 1.5)})
    plots.save(fig, tmp_path, "figure", frame)
    plt.close(fig)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figure.csv", "figure.png"]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "figure.csv"), frame, check_dtype=False)
