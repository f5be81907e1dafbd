"""Mirror decoder against the language models themselves; rivals and calibration against what they promise."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from scipy.optimize import minimize
from transformer_lens.model_bridge import TransformerBridge
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from saeutils.analysis.matching import match
from saeutils.lm import models
from saeutils.metrics import evaluate
from saeutils.saes import (
    SparseJumpReLUTrainingSAE,
    SparseJumpReLUTrainingSAEConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
    initializers,
)


def _jumprelu(d=640, n=1024, l0=20.0):
    torch.manual_seed(0)
    return SparseJumpReLUTrainingSAE(SparseJumpReLUTrainingSAEConfig(d_in=d, d_sae=n, target_l0=l0))


def _lm(kind):
    """The real gated and post-normed models; GPT-2's and Gemma 2's blocks with random weights, as the hub is out of reach."""
    if kind in ("gemma-3-270m", "smollm2-135m"):
        return models.load_lm(kind, dtype=torch.float32)
    torch.manual_seed(0)
    if kind == "gpt2":
        hf = GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=3, n_head=4, vocab_size=300))
        torch.nn.init.normal_(hf.transformer.h[1].mlp.c_proj.bias)
    else:
        hf = Gemma2ForCausalLM(Gemma2Config(
            hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=12, vocab_size=300,
        ))  # fmt: skip
        torch.nn.init.normal_(hf.model.layers[1].post_feedforward_layernorm.weight)
    _, tokenizer = models.load_hf("gemma-3-270m", layers=1)
    return TransformerBridge.boot_transformers(kind, hf_model=hf.eval(), tokenizer=tokenizer, device="cpu")


@pytest.mark.parametrize("kind", ["gpt2", "gemma-2", "smollm2-135m", "gemma-3-270m"])
def test_columns_rebuild_what_the_mlp_adds(kind):
    """Σ_i σ_i·u_i (over the norm's root mean square, where there is one) plus the bias is resid_post − resid_mid."""
    lm, layer = _lm(kind), 1
    ids = torch.randint(10, 290, (2, 12), generator=torch.Generator().manual_seed(0))
    _, cache = lm.run_with_cache(ids)
    added = cache[f"blocks.{layer}.hook_resid_post"] - cache[f"blocks.{layer}.hook_resid_mid"]
    sigma = cache[f"blocks.{layer}.mlp.out.hook_in"]  # [batch, position, d_mlp]
    U = initializers.mlp_directions(lm, layer)
    block = lm.blocks[layer]
    rebuilt = sigma @ U
    if hasattr(block, "ln2_post"):
        raw = sigma @ block.mlp.W_out.float()
        rebuilt = rebuilt / (raw.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    elif (bias := getattr(block.mlp, "b_out", None)) is not None:
        rebuilt = rebuilt + bias
    error = (rebuilt - added).detach().norm() / added.detach().norm()
    assert float(error) < 1e-4


def test_mirror_decoder():
    lm = models.load_lm("gemma-3-270m")
    sae = _jumprelu(n=4096, l0=64)
    initializers.mirror_decoder(sae, lm, 12)
    U = torch.nn.functional.normalize(initializers.mlp_directions(lm, 12), dim=1)
    assert torch.allclose(sae.W_dec[:2048], U, atol=1e-5) and torch.allclose(sae.W_dec[2048:], -U, atol=1e-5)
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    with pytest.raises(ValueError, match="d_sae = 4096, d_in = 640; the SAE has 1024 and 640"):
        initializers.mirror_decoder(_jumprelu(), lm, 12)
    with pytest.raises(ValueError, match="the model has blocks 0…17"):
        initializers.mirror_decoder(sae, lm, 18)
    bridge = {"hook_dict": {}, "tokenizer": None, "original_model": None}
    attention_only = SimpleNamespace(blocks=[SimpleNamespace(mlp=None)], **bridge)
    with pytest.raises(ValueError, match="block 0 has no MLP"):
        initializers.mirror_decoder(sae, attention_only, 0)


def test_rivals(rows):
    lm = models.load_lm("gemma-3-270m")
    sae = _jumprelu()
    initializers.random_decoder(sae, 7)
    first = sae.W_dec.detach().clone()
    initializers.random_decoder(sae, 7)
    assert torch.equal(first, sae.W_dec)
    initializers.data_points(sae, rows, 0)
    nearest = match(sae.W_dec, rows)[1]
    assert nearest.min() > 0.999
    initializers.k_means(sae, rows, 0)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(1024), atol=1e-5)
    initializers.residual_mirror_decoder(sae, lm, 0, rows, share=0.25)
    U = initializers.mlp_directions(lm, 0)
    assert match(sae.W_dec[:256], torch.cat([U, -U]))[1].min() > 0.999
    for start in (initializers.data_points, initializers.k_means):
        with pytest.raises(ValueError, match="100 rows cannot start 1,024 latents"):
            start(sae, rows[:100], 0)
    with pytest.raises(ValueError, match="share=1"):
        initializers.residual_mirror_decoder(sae, lm, 0, rows, share=1)


@pytest.mark.parametrize("start", ["random", "mirror"])
def test_calibrated_sae_starts_at_its_l0(rows, start):
    """Whatever the directions: the L0 asked for, no latent dead or always on, an error below that of predicting nothing."""
    x = rows / rows.pow(2).sum(1).mean().sqrt()
    sae, elsewhere = _jumprelu(n=4096, l0=40), []
    if start == "random":
        initializers.random_decoder(sae, 0)
    else:
        initializers.mirror_decoder(sae, models.load_lm("gemma-3-270m"), 0)
    begun = copy.deepcopy(sae.state_dict())
    halves = x[:8000], x[8000:]
    for here, other in (halves, halves[::-1]):  # a half with louder rows fires more under the other's thresholds: both ways
        sae.load_state_dict(begun)
        initializers.calibrate(sae, here, 40)
        there = evaluate(sae, here)
        assert there["l0"] == pytest.approx(40, rel=0.02) and there["dead"] == 0 and there["fvu"] < 1
        elsewhere.append(evaluate(sae, other)["l0"])
    assert sum(elsewhere) / 2 == pytest.approx(40, rel=0.1)
    with pytest.raises(ValueError, match="10 rows are too few"):
        initializers.calibrate(sae, x[:10], 40)
    with pytest.raises(ValueError, match="L0 3000 cannot be reached"):
        initializers.calibrate(sae, x[:1000], 3000)
    with pytest.raises(ValueError, match="has no thresholds"):
        initializers.calibrate(StandardTrainingSAE(StandardTrainingSAEConfig(d_in=640, d_sae=8)), x, 4)


def test_geometric_median_is_the_minimiser():
    x = torch.randn(60, 3, dtype=torch.double) ** 3
    best = minimize(lambda m: np.linalg.norm(x.numpy() - m, axis=1).sum(), x.mean(0).numpy(), tol=1e-12)
    assert np.allclose(initializers.geometric_median(x, 1000, 1e-12).numpy(), best.x, atol=1e-4)


def test_fold_scale_is_exact(rows):
    raw, shift, scale = rows * 7 + 3, torch.full((640,), 3.0), 1 / 7
    torch.manual_seed(0)
    sae = SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(d_in=640, d_sae=512, k=8))
    with torch.no_grad():
        sae.b_enc.normal_()
        sae.b_dec.normal_()
    inside = sae((raw[:50] - shift) * scale) / scale + shift
    initializers.fold_scale(sae, scale, shift)
    assert torch.allclose(sae(raw[:50]), inside, atol=1e-2)
