"""sparse_topk, sparse_batchtopk and sparse_standard against dense autograd and against SAELens' own."""

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import SAE, TrainStepInput
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file

from saeutils.saes import (
    GBATrainingSAE,
    GBATrainingSAEConfig,
    SparseBatchTopKTrainingSAE,
    SparseBatchTopKTrainingSAEConfig,
    SparseStandardTrainingSAE,
    SparseStandardTrainingSAEConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
)
from saeutils.saes.base import aux_loss
from saeutils.training.checks import Options
from saeutils.training.loop import _Trainer

PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")


def _pair(d, n, k, seed=0, batch=False, **kw):
    """Ours and SAELens' (Batch)TopK with equal weights, decoder rows at norm 1 and all biases non-zero."""
    torch.manual_seed(seed)
    classes = (
        (SparseBatchTopKTrainingSAE, SparseBatchTopKTrainingSAEConfig, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig)
        if batch
        else (SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig)
    )
    plain = dict(d_in=d, d_sae=n, k=k, rescale_acts_by_decoder_norm=False, decoder_init_norm=1.0, **kw)
    ours, theirs = classes[0](classes[1](**plain)), classes[2](classes[3](**plain))
    with torch.no_grad():
        ours.b_enc.normal_(std=0.1)
        ours.b_dec.normal_(std=0.1)
        for name in PARAMETERS:
            getattr(theirs, name).copy_(getattr(ours, name))
    return ours, theirs


def _gradients(sae, x, dead=None, **coefficients):
    sae.zero_grad()
    step = TrainStepInput(
        sae_in=x, coefficients=coefficients, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False
    )
    out = sae.training_forward_pass(step)
    out.loss.backward()
    return out, {n: getattr(sae, n).grad.clone() for n in PARAMETERS}


def _close(a, b, tolerance=1e-5):
    return float(((a - b).norm() / b.norm().clamp_min(1e-12)).detach()) <= tolerance


def _same_gradients(a, b):
    """Close, or off by the rounding of dot products that cancel: float32 keeps 1e-7 of their terms, whatever is left."""
    terms = b["W_dec"].norm()
    return all(_close(a[n], b[n]) or float((a[n] - b[n]).norm()) <= 1e-6 * float(terms) for n in PARAMETERS)


@settings(max_examples=25, deadline=None)
@given(
    d=st.integers(2, 24), n=st.integers(3, 60), k=st.integers(1, 3), batch=st.integers(1, 300), n_dead=st.integers(0, 60),
    shift=st.booleans(), seed=st.integers(0, 99), bounded=st.booleans(),
)  # fmt: skip
def test_gradients_equal_dense_autograd(d, n, k, batch, n_dead, shift, seed, bounded, searched):
    ours, theirs = _pair(d, n, k, seed, apply_b_dec_to_input=shift)
    x = torch.randn(batch, d)
    dead = torch.arange(n) < n_dead
    with searched(bounded):
        a, grads_a = _gradients(ours, x, dead)
    b, grads_b = _gradients(theirs, x, dead)
    assert _close(a.loss, b.loss)
    assert _close(a.feature_acts.to_dense(), b.feature_acts)
    assert _same_gradients(grads_a, grads_b)


@settings(max_examples=25, deadline=None)
@given(
    d=st.integers(2, 24), n=st.integers(9, 60), k=st.floats(0.3, 3), batch=st.integers(1, 300), n_dead=st.integers(0, 60),
    level=st.sampled_from([0.0, 0.1, 1.0, 50.0]), shift=st.booleans(), seed=st.integers(0, 99),
    bounded=st.booleans(),
)  # fmt: skip
def test_batchtopk_gradients_equal_dense_autograd_whatever_the_guess(
    d, n, k, batch, n_dead, level, shift, seed, bounded, searched
):
    ours, theirs = _pair(d, n, k, seed, batch=True, apply_b_dec_to_input=shift)
    ours.level, x, dead = level, torch.randn(batch, d), torch.arange(n) < n_dead
    with searched(bounded):
        a, grads_a = _gradients(ours, x, dead)
    b, grads_b = _gradients(theirs, x, dead)
    assert _close(a.loss, b.loss) and _close(a.feature_acts.to_dense(), b.feature_acts)
    assert torch.allclose(ours.topk_threshold, theirs.topk_threshold, rtol=1e-5)
    assert _same_gradients(grads_a, grads_b)


@settings(max_examples=25, deadline=None)
@given(
    d=st.integers(2, 24), n=st.integers(3, 60), batch=st.integers(1, 300), shift=st.booleans(), seed=st.integers(0, 99),
    bounded=st.booleans(),
)  # fmt: skip
def test_relu_gradients_equal_saelens(d, n, batch, shift, seed, bounded, searched):
    torch.manual_seed(seed)
    settings_ = dict(d_in=d, d_sae=n, l1_coefficient=0.3, apply_b_dec_to_input=shift)
    ours = SparseStandardTrainingSAE(SparseStandardTrainingSAEConfig(**settings_))
    theirs = StandardTrainingSAE(StandardTrainingSAEConfig(**settings_))
    with torch.no_grad():
        ours.b_enc.normal_()
        for name in PARAMETERS:
            getattr(theirs, name).copy_(getattr(ours, name))
    x = torch.randn(batch, d)
    with searched(bounded):
        a, grads_a = _gradients(ours, x, l1=0.3)
    b, grads_b = _gradients(theirs, x, l1=0.3)
    assert _close(a.loss, b.loss) and _close(a.feature_acts.to_dense(), b.feature_acts)
    assert all(torch.allclose(a.losses[k], b.losses[k], rtol=1e-5) for k in b.losses)
    assert _same_gradients(grads_a, grads_b)


def test_relu_is_saved_as_an_ordinary_standard_sae(tmp_path, rows):
    sae = SparseStandardTrainingSAE(SparseStandardTrainingSAEConfig(d_in=640, d_sae=512))
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert loaded.cfg.architecture() == "standard" and torch.equal(loaded(rows[:64]), sae(rows[:64]))


@pytest.mark.parametrize("n_dead", [1, 320, 321, 700])  # of 640 / 2 = 320 that count
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auxiliary_loss_of_few_and_many_dead_equals_saelens(rows, n_dead, dtype):
    ours, theirs = _pair(640, 1024, 16, aux_loss_coefficient=1.0)
    x, dead = rows[:200].to(dtype), torch.arange(1024) < n_dead
    out = x * 0.5
    loss = aux_loss(ours.to(dtype), x, out, dead, 1.0)
    expected = theirs.to(dtype).calculate_topk_aux_loss(x, out, theirs.encode_with_hidden_pre(x)[1], dead)
    loss.backward()
    expected.backward()
    assert _close(loss, expected)
    for name in PARAMETERS:
        assert _close(getattr(ours, name).grad, getattr(theirs, name).grad), name


@pytest.mark.parametrize("batch", [False, True])
def test_fifty_steps_equal_saelens(rows, batch):
    """Same trainer (SAELens' own), same batches: losses and weights agree to 1e-4."""
    ours, theirs = _pair(640, 2048, 32, batch=batch, aux_loss_coefficient=1 / 32)
    cfg = SAETrainerConfig(
        total_training_samples=50 * 512, train_batch_size_samples=512, lr=3e-4, lr_end=3e-4, dead_feature_window=10
    )
    batches = [rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(i))[:512]] for i in range(50)]
    total, mse = ([], []), ([], [])
    for i, sae in enumerate((ours, theirs)):
        trainer = SAETrainer(cfg, sae, iter([]))
        for batch in batches:
            out = trainer.step(batch)
            total[i].append(float(out.loss.detach()))
            mse[i].append(float(out.losses["mse_loss"].detach()))
            trainer.n_training_steps += 1
    assert total[0] == pytest.approx(total[1], rel=1e-4)
    assert total[0][-1] > mse[0][-1]  # and some latents were dead, so aux-k took part
    for name in PARAMETERS:
        assert _close(getattr(ours, name), getattr(theirs, name), 1e-4), name


def test_our_trainer_equals_saelens_trainer(rows):
    """Fused Adam with clipping inside the kernel and sparse bookkeeping change nothing but the time."""
    saes = [_pair(640, 1024, 16)[0] for _ in range(2)]
    cfg = SAETrainerConfig(
        total_training_samples=20 * 512, train_batch_size_samples=512, lr=3e-4, lr_end=3e-4, lr_warm_up_steps=5,
        lr_decay_steps=5, dead_feature_window=5,
    )  # fmt: skip
    ours = _Trainer("", cfg, saes[0], Options(unit_norm=False, aux_k=1.0), None)
    theirs = SAETrainer(cfg, saes[1], iter([]))
    for i in range(20):
        a, b = ours.step(rows[i * 512 : (i + 1) * 512]), theirs.step(rows[i * 512 : (i + 1) * 512])
        assert float(a.loss.detach()) == pytest.approx(float(b.loss.detach()), rel=1e-4)
    assert torch.equal(ours.act_freq_scores, theirs.act_freq_scores)
    assert torch.equal(ours.n_forward_passes_since_fired, theirs.n_forward_passes_since_fired)


def test_batchtopk_is_saved_as_an_ordinary_jumprelu_sae(tmp_path, rows):
    ours, theirs = _pair(640, 512, 8, batch=True)
    for sae, folder in ((ours, tmp_path / "ours"), (theirs, tmp_path / "theirs")):
        for i in range(5):
            _gradients(sae, rows[i * 64 : (i + 1) * 64])
        sae.save_inference_model(folder)
    a, b = (SAE.load_from_disk(tmp_path / name) for name in ("ours", "theirs"))
    assert a.cfg.architecture() == "jumprelu" and torch.allclose(a.threshold, b.threshold)
    assert torch.allclose(a(rows[:64]), b(rows[:64]), atol=1e-4)


def test_saved_as_an_ordinary_topk_sae(tmp_path, rows):
    sae, _ = _pair(640, 512, 8)
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is TopKSAE and loaded.cfg.architecture() == "topk" and loaded.cfg.k == 8
    assert torch.equal(loaded(rows[:64]), sae(rows[:64]))
    reconstruction, _, _, acts = sae.sparse_forward(rows[:64], k=8)
    assert torch.allclose(reconstruction, loaded(rows[:64]), atol=1e-4)
    assert torch.allclose(acts.to_dense(), loaded.encode(rows[:64]), atol=1e-4)


@pytest.mark.parametrize(
    "kw, message",
    [
        ({"k": 0}, "k=0 must lie between 1 and d_sae=32"),
        ({"k": 33}, "k=33 must lie between 1 and d_sae=32"),
        ({"k": 4, "rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm=False"),
        ({"k": 4, "normalize_activations": "layer_norm"}, "normalize_activations='none'"),
    ],
)
def test_settings_are_checked(kw, message):
    with pytest.raises(ValueError, match=message):
        SparseTopKTrainingSAEConfig(d_in=8, d_sae=32, **kw)
    with pytest.raises(ValueError, match=message):
        SparseBatchTopKTrainingSAEConfig(d_in=8, d_sae=32, **kw)


@pytest.mark.parametrize("save", ["save_model", "save_inference_model"])
@pytest.mark.parametrize("make", [
    lambda: SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(d_in=8, d_sae=16, k=2)),
    lambda: GBATrainingSAE(GBATrainingSAEConfig(d_in=8, d_sae=20)),
])  # fmt: skip
def test_saving_over_another_is_whole_or_refused(tmp_path, monkeypatch, make, save):
    (tmp_path / "card.json").write_text("{}")
    first, second = make(), make()
    getattr(first, save)(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"card.json", "cfg.json", "sae_weights.safetensors"}
    before = load_file(tmp_path / "sae_weights.safetensors")
    with monkeypatch.context() as m:  # the disk is full before the settings are written
        m.setattr(json, "dump", lambda *a, **kw: (_ for _ in ()).throw(OSError("No space left on device")))
        with pytest.raises(OSError, match="No space"):
            getattr(second, save)(tmp_path)
    after = load_file(tmp_path / "sae_weights.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before) and (tmp_path / "cfg.json").exists()
    move, moved = os.replace, []
    with monkeypatch.context() as m:  # killed between the two files
        m.setattr(os, "replace", lambda a, b: moved.append(b) or (move(a, b) if len(moved) < 2 else (_ for _ in ()).throw(KeyboardInterrupt)))
        with pytest.raises(KeyboardInterrupt):
            getattr(second, save)(tmp_path)
    assert not (tmp_path / "cfg.json").exists()  # SAELens refuses, rather than new weights with old settings
    weights, settings_ = getattr(second, save)(tmp_path)
    assert weights.exists() and settings_.exists() and len(list(tmp_path.iterdir())) == 3
