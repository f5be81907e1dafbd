"""What a model's parts do, measured on rows instead of looked up by one architecture's names."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # late: it takes seconds to import
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel

EXACT = 1e-3  # relative error of what is only rounded otherwise, in float32


def tolerance(dtype: torch.dtype) -> float:
    """Relative error of one layer in ``dtype`` that is rounding."""
    return EXACT if dtype == torch.float32 else 3e-2


def positions(model: PreTrainedModel) -> float:
    """How many tokens a model can read at once; inf where its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


@torch.no_grad()
def final_norm(lm: TransformerBridge) -> tuple[Tensor, bool]:
    """γ of the norm before the unembedding as it acts (Gemma's is 1 + weight), [d] float32, and whether it centres.

    Fitted to what the norm makes of random rows, so no architecture's names or conventions are taken for granted.

    Raises:
        ValueError: no such norm, or one that is neither an RMSNorm nor a LayerNorm.
    """
    norm = getattr(lm, "ln_final", None)
    if norm is None:
        raise ValueError(f"{lm.cfg.model_name}: no norm before the unembedding is known (ln_final)")
    weight = next(norm.original_component.parameters(), torch.zeros((), device=lm.cfg.device))
    x = torch.randn(64, lm.cfg.d_model, generator=torch.Generator().manual_seed(0)) * 10
    x = x.to(weight.device, weight.dtype)
    y = norm.original_component(x).float()
    y = y - norm.original_component(torch.zeros_like(x[:1])).float()  # its bias
    x = x.float()
    for centres in (False, True):
        z = x - x.mean(1, keepdim=True) if centres else x
        z = z / z.pow(2).mean(1, keepdim=True).sqrt()
        gain = (y * z).sum(0) / z.pow(2).sum(0)
        if float((gain * z - y).norm() / y.norm()) < tolerance(weight.dtype):
            return gain, centres
    raise ValueError(f"{lm.cfg.model_name}: its final norm {type(norm.original_component).__name__} is no RMSNorm or LayerNorm")


@torch.no_grad()
def mlp_gain(lm: TransformerBridge, layer: int, U: Tensor) -> Tensor:
    """What stands between a block's MLP and the stream, per coordinate, [d] float32: the gain of the norm behind it, or ones.

    Each norm of the block is tried: with the right gain g, what the MLP adds to the stream (``hook_mlp_out``) is g times its
    output matrix's, but for one factor a token. ``U`` [d_mlp, d]: the output matrix.

    Raises:
        ValueError: no norm of the block explains what is added.
    """
    ids = torch.randint(0, lm.cfg.d_vocab, (2, 12), generator=torch.Generator().manual_seed(0)).to(lm.cfg.device)
    block, name, seen = lm.blocks[layer], f"blocks.{layer}", {}

    def see(x: Tensor, hook) -> None:
        seen[hook.name] = x.float()

    wanted = [f"{name}.hook_mlp_out", f"{name}.mlp.out.hook_in", f"{name}.mlp.out.hook_out"]
    if missing := [w for w in wanted if w not in lm.hook_dict]:
        raise ValueError(f"block {layer}: the model has no hook points {missing}: mirror_decoder needs them, use data_points")
    lm.run_with_hooks(ids, fwd_hooks=[(w, see) for w in wanted], return_type=None)
    added, active, out = (seen[lm.hook_dict[w].name].flatten(0, 1) for w in wanted)
    bias = (out - active @ U).mean(0)  # [d], or none
    d, fits = U.shape[1], {}
    norms = {n: m.original_component for n, m in block.named_children() if n.startswith("ln")}
    gains = {"": torch.ones(d, device=U.device)}
    gains |= {n: m(torch.ones(1, d, device=U.device, dtype=lm.cfg.dtype))[0].float() for n, m in norms.items()}
    for n, gain in gains.items():
        r = (active @ U + bias) * gain
        s = (r * added).sum(1, keepdim=True) / r.pow(2).sum(1, keepdim=True).clamp_min(1e-30)  # one factor a token
        fits[n] = float((s * r - added).norm() / added.norm())
    best = min(fits, key=fits.get)
    if fits[best] > tolerance(lm.cfg.dtype):
        raise ValueError(
            f"block {layer}: what the MLP adds to the stream is not its output matrix behind one norm (missed by "
            f"{fits[best]:.0%}): mirror_decoder cannot start here, use data_points"
        )
    return gains[best]
