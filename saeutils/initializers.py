"""Starting points for the weights of any SAELens SAE."""

import math

import torch
from sae_lens.saes.sae import SAE
from torch import Tensor


@torch.no_grad()
def geometric_median(x: Tensor, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least summed distance to the rows of ``x`` [n, d] → [d]; Weiszfeld's fixed point.

    Start of ``b_dec`` in Bricken et al. 2023 ("Towards Monosemanticity") and Gao et al. 2024.
    """
    median = x.mean(0)
    for _ in range(iterations):
        weight = 1 / (x - median).norm(dim=1).clamp_min(1e-8)  # [n]
        new = (weight[:, None] * x).sum(0) / weight.sum()
        if (new - median).norm() <= tolerance * median.norm().clamp_min(1e-8):
            return new
        median = new
    return median


@torch.no_grad()
def decoder_bias_at_median(sae: SAE, x: Tensor) -> None:
    """Set ``b_dec`` to the geometric median of rows ``x`` [n, d_in]."""
    sae.b_dec.copy_(geometric_median(x.to(sae.b_dec)))


@torch.no_grad()
def tie(sae: SAE) -> None:
    """Unit decoder rows and W_enc = W_decᵀ, in place (the memory layout of W_enc stays)."""
    sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8)
    sae.W_enc.copy_(sae.W_dec.T)


@torch.no_grad()
def fold_scale(sae: SAE, scale: float, shift: Tensor | None = None) -> None:
    """Make an SAE trained on (x − shift)·scale take x itself, in place; decoder norms stay, latents shrink by 1/scale.

    Exact for encoders that are positively homogeneous in (input, bias), such as ReLU and TopK:
    f(s·z; b) = s·f(z; b/s). Thresholds, where there are any, shrink with the biases.

    Raises:
        ValueError: a shift with an SAE that does not subtract ``b_dec`` from its input.
    """
    if shift is not None and not sae.cfg.apply_b_dec_to_input:
        raise ValueError("a shift can be folded only where apply_b_dec_to_input=True")
    sae.b_enc /= scale
    sae.b_dec /= scale
    if shift is not None:
        sae.b_dec += shift.to(sae.b_dec)
    if hasattr(sae, "log_threshold"):  # JumpReLU in training keeps the logarithm
        sae.log_threshold -= math.log(scale)
    elif hasattr(sae, "threshold"):
        sae.threshold /= scale
    if hasattr(sae, "topk_threshold"):  # BatchTopK
        sae.topk_threshold /= scale
