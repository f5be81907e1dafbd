"""sparse_jumprelu against dense autograd and against dictionary_learning's JumpReLU trainer."""

import importlib
import io
import sys
import types
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE
from sae_lens.saes.sae import TrainStepInput

from saeutils.kernels import files
from saeutils.lm import archives
from saeutils.saes import SparseJumpReLUTrainingSAE, SparseJumpReLUTrainingSAEConfig
from saeutils.training import train

PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def _sae(d, n, target=2.0, seed=0, **kw):
    torch.manual_seed(seed)
    sae = SparseJumpReLUTrainingSAE(SparseJumpReLUTrainingSAEConfig(d_in=d, d_sae=n, target_l0=target, **kw))
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1)
        sae.b_dec.normal_(std=0.1)
        sae.threshold.uniform_(0.05, 0.4)
    return sae


def _gradients(sae, x, forward):
    sae.zero_grad()
    step = TrainStepInput(x, {"l0": 0.7}, None, n_training_steps=0, is_logging_step=False)
    out = forward(sae, step)
    out.loss.backward()
    return out, {n: getattr(sae, n).grad.clone() for n in PARAMETERS}


def _close(a, b, tolerance=1e-5):
    return float(((a - b).norm() / b.norm().clamp_min(1e-12)).detach()) <= tolerance


@settings(max_examples=30, deadline=None)
@given(
    d=st.integers(2, 24), n=st.integers(3, 60), batch=st.integers(1, 600), bandwidth=st.sampled_from([0.001, 0.1, 1.0]),
    shift=st.booleans(), seed=st.integers(0, 99), bounded=st.booleans(),
)  # fmt: skip
def test_sparse_pass_equals_dense_autograd(d, n, batch, bandwidth, shift, seed, bounded, searched):
    sae = _sae(d, n, seed=seed, jumprelu_bandwidth=bandwidth, apply_b_dec_to_input=shift)
    x = torch.randn(batch, d)
    with searched(bounded):
        a, grads_a = _gradients(sae, x, SparseJumpReLUTrainingSAE.training_forward_pass)
    b, grads_b = _gradients(sae, x, JumpReLUTrainingSAE.training_forward_pass)
    assert _close(a.loss, b.loss)
    assert _close(a.feature_acts.to_dense(), b.feature_acts)
    for name in PARAMETERS:
        assert _close(grads_a[name], grads_b[name]), name


@pytest.fixture(scope="module")
def reference():
    """``dictionary_learning.trainers.jumprelu`` out of the pinned wheel, without the package's own imports."""
    with zipfile.ZipFile(io.BytesIO(archives.fetch("dictionary-learning").read_bytes())) as wheel:
        folder = files.cache_dir("dictionary-learning")
        wheel.extractall(folder)
    names = ("dictionary_learning", "dictionary_learning.trainers")
    for name in names:
        package = types.ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package
    yield importlib.import_module("dictionary_learning.trainers.jumprelu")
    for name in [n for n in sys.modules if n.startswith("dictionary_learning")]:
        del sys.modules[name]


def _trainer(reference, sae, **kw):
    """Their trainer with our weights."""
    trainer = reference.JumpReluTrainer(
        activation_dim=sae.cfg.d_in, dict_size=sae.cfg.d_sae, layer=0, lm_name="", target_l0=sae.cfg.target_l0, **kw
    )
    with torch.no_grad():
        for name in PARAMETERS:
            getattr(trainer.ae, name).copy_(getattr(sae, name))
    return trainer


def test_loss_and_gradients_equal_dictionary_learning(reference):
    """All but the threshold's L0 term: theirs sees activations after the jump, so only the upper half-window counts.

    (And under θ < bandwidth/2 every silent row would count, its activation 0 lying in the window: thresholds here are above.)
    """
    bandwidth = 0.05
    sae = _sae(16, 48, 6.0, apply_b_dec_to_input=False, jumprelu_bandwidth=bandwidth)
    x = torch.randn(400, 16)
    trainer = _trainer(
        reference, sae, steps=100, bandwidth=bandwidth, sparsity_penalty=0.7, warmup_steps=5, sparsity_warmup_steps=None
    )
    out, ours = _gradients(sae, x, SparseJumpReLUTrainingSAE.training_forward_pass)
    loss = trainer.loss(x, step=50)
    loss.backward()
    assert _close(out.loss, loss)
    for name in PARAMETERS[:-1]:
        assert _close(ours[name], getattr(trainer.ae, name).grad), name
    with torch.no_grad():
        pre = x @ sae.W_enc + sae.b_enc
        lower = (pre <= sae.threshold) & (pre > sae.threshold - bandwidth / 2)
        l0 = float((pre > sae.threshold).sum(1).float().mean())
    slope = 0.7 * 2 * (l0 / sae.cfg.target_l0 - 1) / sae.cfg.target_l0
    theirs = trainer.ae.threshold.grad - slope * lower.float().mean(0) / bandwidth  # the half they leave out
    assert _close(ours["threshold"], theirs)
    assert not _close(ours["threshold"], trainer.ae.threshold.grad)


def test_steps_equal_dictionary_learning(reference):
    """20 steps of their loop (Adam β=(0, .999), tangential gradients, unit rows, clipping) and of ours, without windows."""
    sae = _sae(16, 48, 6.0, apply_b_dec_to_input=False, jumprelu_bandwidth=1e-9, l0_coefficient=0.7)
    with torch.no_grad():
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    trainer = _trainer(
        reference, sae, steps=20, lr=1e-3, bandwidth=1e-9, sparsity_penalty=0.7, warmup_steps=0, sparsity_warmup_steps=None
    )  # fmt: skip
    batches = [torch.randn(128, 16) * 0.2 for _ in range(21)]
    train(sae, iter(batches), 20, lr=1e-3, betas=(0.0, 0.999), warm_up=0, decay=0, median_rows=0, progress=False)
    for step, batch in enumerate(batches[:20]):
        trainer.update(step, batch)
    for name in PARAMETERS:
        assert _close(getattr(sae, name), getattr(trainer.ae, name), 1e-4), name


@pytest.mark.parametrize("kw, message", [({"target_l0": 0}, "target_l0"), ({"target_l0": 99}, "target_l0")])
def test_impossible_target(kw, message):
    with pytest.raises(ValueError, match=message):
        SparseJumpReLUTrainingSAEConfig(d_in=4, d_sae=8, **kw)
