"""An SAE remembers its rows: where they came from, how they were scaled, and whether that is folded into it."""

import copy
from functools import partial

import pytest
import tiny
import torch
from datasets import Dataset
from sae_lens import SAE

from saeutils import metrics, steering
from saeutils.analysis import features
from saeutils.lm import activations, models, provenance, streams
from saeutils.saes import SparseJumpReLUTrainingSAE, SparseJumpReLUTrainingSAEConfig, gba, initializers
from saeutils.training import train

HOOK = "blocks.1.hook_resid_post"
TEXT = Dataset.from_list([{"text": f"the quick brown fox number {i} jumps"} for i in range(300)])


@pytest.fixture(scope="module")
def folder():
    return tiny.saved("gpt2")


@pytest.fixture(scope="module")
def acts(folder):
    return activations.collect(folder, HOOK, TEXT, context=32, dtype=torch.float32)


def _trained(batches):
    torch.manual_seed(0)
    sae = SparseJumpReLUTrainingSAE(SparseJumpReLUTrainingSAEConfig(d_in=32, d_sae=64, target_l0=8.0, apply_b_dec_to_input=True))
    train(sae, batches, 60, lr=2e-3, progress=False)
    return sae


@pytest.fixture(scope="module")
def sae(acts):
    return _trained(partial(acts.batches, 256, normalise="rms", centre=True))


@pytest.fixture(scope="module")
def folded(acts, sae):
    copied = copy.deepcopy(sae)
    initializers.fold_scale(copied, acts.scale(normalise="rms"), acts.mean)
    return copied


def test_training_writes_it_down_and_saving_keeps_it(acts, sae, folded, tmp_path):
    assert (sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name) == (acts.meta["lm"], HOOK)
    assert sae.cfg.metadata.rows == {"normalise": "rms", "factor": acts.scale(normalise="rms"), "centred": True}
    folded.save_inference_model(str(tmp_path))
    again = SAE.load_from_disk(str(tmp_path))
    assert again.cfg.metadata.rows == sae.cfg.metadata.rows and again.cfg.metadata.folded == pytest.approx(acts.scale(normalise="rms"))
    with pytest.raises(ValueError, match="folded already"):
        initializers.fold_scale(again, acts.scale(normalise="rms"), acts.mean)


def test_a_stream_writes_the_same(folder, acts, monkeypatch):
    monkeypatch.setenv("SAEUTILS_CAP", "shard_tokens=1000")
    stream = partial(streams.stream, folder, HOOK, TEXT, batch_size=256, context=32, normalise="rms", centre=True, buffer=2, dtype=torch.float32)
    rows = _trained(stream).cfg.metadata.rows
    assert rows["normalise"] == "rms" and rows["centred"] and rows["factor"] == pytest.approx(acts.scale(normalise="rms"), rel=0.1)


def test_folded_it_reads_raw_rows_as_it_read_scaled_ones(acts, sae, folded):
    x = acts.all()["x"]
    scaled = metrics.evaluate(sae, (x - acts.mean) * acts.scale(normalise="rms"))
    assert metrics.evaluate(folded, x) == pytest.approx(scaled, rel=1e-3)
    table = features.latent_table(acts, folded, len(TEXT))
    assert table.acts.nnz / table.acts.shape[0] == pytest.approx(scaled["l0"], rel=1e-3)


def test_unfolded_it_refuses_raw_rows(acts, sae, folder):
    for use in (
        lambda: features.latent_table(acts, sae, len(TEXT)),
        lambda: steering.clamp(HOOK, sae, 3, 1.0),
        lambda: steering.splice(HOOK, sae),
        lambda: steering.loss_recovered(models.load_lm(folder), sae, HOOK, ["the quick brown fox"]),
    ):
        with pytest.raises(ValueError, match=r"trained on scaled rows, .*: initializers\.fold_scale"):
            use()


@pytest.mark.parametrize("scale, shifted, message", [
    (0.0, True, "expected a finite number above 0"), (float("nan"), True, "expected a finite number above 0"), (3.0, True, r"trained on \(x − mean\)·"),
    (None, False, r"not x·"),
])  # fmt: skip
def test_only_what_it_was_trained_on_is_folded(acts, sae, scale, shifted, message):
    scale = acts.scale(normalise="rms") if scale is None else scale
    with pytest.raises(ValueError, match=message):
        initializers.fold_scale(copy.deepcopy(sae), scale, acts.mean if shifted else None)


def test_another_hook_point_is_refused(acts, folded):
    with pytest.raises(ValueError, match=r"trained at blocks\.1\.hook_resid_post, not at blocks\.2"):
        steering.clamp("blocks.2.hook_resid_post", folded, 3, 1.0)
    acts = copy.copy(acts)
    acts.meta = acts.meta | {"hook": "blocks.0.hook_resid_post"}
    with pytest.raises(ValueError, match=r"not at blocks\.0"):
        features.latent_table(acts, folded, len(TEXT))


def test_saes_of_unit_rows_get_them_and_cannot_be_folded(acts, tmp_path):
    torch.manual_seed(0)
    sae = gba.GBATrainingSAE(gba.GBATrainingSAEConfig(d_in=32, d_sae=64, frequencies=[0.2, 0.1]))
    train(sae, partial(acts.batches, 256, normalise="l2"), 20, progress=False)
    unit = features.encoded(sae, acts.all()["x"], l2=True)
    assert (features.latent_table(acts, sae, len(TEXT)).acts != unit.tocsc()).nnz == 0
    with pytest.raises(ValueError, match="takes rows of norm 1, not activations as they are"):
        steering.splice(HOOK, sae)
    sae.save_inference_model(str(tmp_path))
    exported = SAE.load_from_disk(str(tmp_path))  # it scales rows itself
    steering.splice(HOOK, exported)
    assert (features.latent_table(acts, exported, len(TEXT)).acts > 0).nnz == unit.nnz
    for one in (sae, exported):
        with pytest.raises(ValueError, match="scales each row itself: no one factor"):
            initializers.fold_scale(one, 1.7, acts.mean)


def test_of_an_sae_from_elsewhere_nothing_is_known(folded):
    other = copy.deepcopy(folded)
    other.cfg.metadata.rows = other.cfg.metadata.folded = other.cfg.metadata.hook_name = None
    provenance.require_raw(other, HOOK)
    provenance.require_foldable(other, 2.0, True)
