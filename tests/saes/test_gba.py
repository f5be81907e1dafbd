"""Group Bias Adaptation against a slow, literal transcription, dense autograd, and its own saved form."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE
from sae_lens.saes.sae import TrainStepInput

from saeutils.saes import gba
from saeutils.training import train


def make(d=12, width=40, seed=0, **kwargs) -> gba.GBATrainingSAE:
    torch.manual_seed(seed)
    kwargs = {"frequencies": gba.geometric(0.3, 0.02, 4)} | kwargs
    return gba.GBATrainingSAE(gba.GBATrainingSAEConfig(d_in=d, d_sae=width, **kwargs))


def rows(n=300, d=12, seed=0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def literal(bias, ys, targets, down, up, silent):
    """The algorithm in words: for every neuron of every group, from all pre-activations y of the window."""
    new = bias.clone()
    size = len(bias) // len(targets)
    for k, p in enumerate(targets):
        group = range(k * size, (k + 1) * size)
        r = {m: max(float(ys[:, m].max()), 0.0) for m in group}
        positive = [v for v in r.values() if v > 0]
        mean = sum(positive) / len(positive) if positive else 1.0
        for m in group:
            q = float((ys[:, m] > 0).double().mean())
            if q > p:
                new[m] = max(float(bias[m]) - down * r[m], -1.0)
            elif q < silent:
                new[m] = min(float(bias[m]) + up * mean, 0.0)
    return new


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9999), st.sampled_from([1, 2, 4]), st.floats(0.001, 2.0), st.floats(0.001, 2.0), st.booleans())
def test_update_is_the_algorithm(seed, groups, down, up, all_dead):
    sae = make(seed=seed, frequencies=gba.geometric(0.3, 0.02, groups), down=down, up=up)
    g = torch.Generator().manual_seed(seed)
    sae.b_enc.copy_(-torch.rand(40, generator=g) - (1.0 if all_dead else 0.0))
    x, bias, ys = rows(300, seed=seed), sae.b_enc.clone(), []
    for part in x.split(100):
        with torch.no_grad():
            ys.append((part - sae.b_dec) @ sae.W_dec.T + sae.b_enc)
        sae.training_forward_pass(TrainStepInput(part, {}, None, 1, False))
    expected = literal(bias, torch.cat(ys), sae.cfg.frequencies, down, up, sae.cfg.silent)
    sae.adapt()
    torch.testing.assert_close(sae.b_enc, expected, rtol=1e-5, atol=1e-6)
    assert (sae.b_enc <= 0).all() and not sae.fired.any() and not sae.seen.any()


@pytest.mark.parametrize("bias", [-0.05, -0.6])  # dense path, sparse path
def test_gradients_are_those_of_dense_autograd(bias):
    sae, x = make(width=400), rows()
    sae.b_enc.fill_(bias)
    sae.amplitude.data.uniform_(0.5, 1.5)
    out = sae.training_forward_pass(TrainStepInput(x, {}, None, 1, False))
    assert out.feature_acts.is_sparse == (bias == -0.6)
    out.loss.backward()
    W, a, b = (p.detach().clone().requires_grad_() for p in (sae.W_dec, sae.amplitude, sae.b_dec))
    y = (x - b) @ W.T + sae.b_enc
    loss = 0.5 * ((((y - sae.b_enc) * (y > 0)) * a) @ W + b - x).pow(2).sum(1).mean()
    loss.backward()
    torch.testing.assert_close(out.loss, loss)
    for ours, theirs in ((sae.W_dec, W), (sae.amplitude, a), (sae.b_dec, b)):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    assert not sae.b_enc.requires_grad


def test_biases_move_during_training_and_frequencies_are_a_ceiling():
    x = rows(4000)
    sae = make(every=5, down=0.2, up=0.2)
    batches = (x[torch.randperm(4000, generator=torch.Generator().manual_seed(i))[:500]] for i in range(301))
    train(sae, batches, 300, lr=1e-3, median_rows=0, progress=False)
    rate = (sae.encode(x) != 0).float().mean(0)
    assert (rate <= 1.6 * sae.target).float().mean() > 0.8
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(40), atol=1e-5)


def test_calibrate_starts_at_the_target():
    sae, x = make(), rows(2000)
    sae.calibrate(x)
    rate = (sae.encode(x) != 0).float().mean(0)
    torch.testing.assert_close(rate, sae.target, atol=6e-4, rtol=0)
    rare = make(frequencies=[1e-4])
    rare.calibrate(x)
    assert ((rare.encode(x) != 0).sum(0) == 1).all()


def test_saves_as_a_jumprelu_sae_with_the_same_outputs(tmp_path):
    sae, x = make(), rows()
    sae.calibrate(x)
    train(sae, iter([x] * 30), 30, lr=1e-2, median_rows=0, progress=False)
    sae.amplitude.data[3] = -0.5
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert loaded.cfg.architecture() == "jumprelu"
    torch.testing.assert_close(loaded(x), sae(x), atol=1e-6, rtol=0)
    torch.testing.assert_close(loaded.encode(x), sae.encode(x), atol=1e-6, rtol=0)
    torch.testing.assert_close(loaded(7 * x), 7 * sae(x), atol=1e-5, rtol=0)  # it takes raw activations


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    x = rows(800)

    def batches(start=0):
        for i in range(start, 60):
            yield x[torch.randperm(800, generator=torch.Generator().manual_seed(i))[:200]]

    run = partial(train, lr=1e-3, progress=False, checkpoint_every=10)
    whole, broken, again = (make(every=7, seed=0) for _ in range(3))
    run(whole, batches, 40)

    def dies(step, *_):
        if step == 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(broken, batches, 40, checkpoint=tmp_path, callback=dies, log_every=1)
    run(again, batches, 40, checkpoint=tmp_path)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_bad_settings_and_inputs_are_refused():
    config = partial(gba.GBATrainingSAEConfig, d_in=12, d_sae=40)
    for bad in ([0.1, 0.2], [1.0, 0.1], [0.1, 0.0], []):
        with pytest.raises(ValueError, match="must fall, all between 0 and 1"):
            config(frequencies=bad)
    with pytest.raises(ValueError, match="3 groups do not divide d_sae=40"):
        config(frequencies=[0.3, 0.2, 0.1])
    with pytest.raises(ValueError, match="every=0: expected a whole number of at least 1"):
        config(every=0)
    with pytest.raises(ValueError, match="gba needs 1: batches"):
        train(make(), iter([3 * rows()]), 1, progress=False)
    with pytest.raises(ValueError, match="all rows are equal"):
        train(make(), iter([rows(1).expand(50, -1)]), 1, progress=False)
