"""Second lives for dead latents: two ways to draw new weights for them. Each returns the latents that it redrew."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # late: together they take seconds to import
    from sae_lens.saes.sae import TrainingSAE


AT_ONCE = 0.02  # share of a dictionary that is woken at a time


@torch.no_grad()
def resample_post(sae: TrainingSAE, dead: Tensor, _batch: Tensor, generator: torch.Generator) -> Tensor:
    """Seed 001's recipe: standard normal encoder columns, zero biases; decoder rows stay.

    Args:
        dead: numbers of dead latents, [n_dead].
    """
    noise = torch.randn(len(dead), sae.cfg.d_in, generator=generator)
    sae.W_enc[:, dead] = noise.T.to(sae.W_enc)
    sae.b_enc[dead] = 0
    return dead


@torch.no_grad()
def resample_anthropic(sae: TrainingSAE, dead: Tensor, batch: Tensor, generator: torch.Generator) -> Tensor:
    """Anthropic's recipe (Bricken et al. 2023, appendix "neuron resampling").

    Each dead latent takes an input, drawn with probability ∝ its squared loss, as decoder direction; its encoder column
    is the same direction at 0.2 × the mean norm of the living encoder columns, its bias 0. No input is drawn twice, or two
    latents would stay equal for ever. At most a share :data:`AT_ONCE` of the dictionary is woken, drawn at random: half of it
    switched on in one step adds up to many times the input (FVU 10⁴). The others wait for the next time.

    Args:
        dead: numbers of dead latents, [n_dead]. batch: inputs to draw from, [batch, d_in].
    """
    order = torch.randperm(len(dead), generator=generator)[: min(len(batch), max(1, int(AT_ONCE * sae.cfg.d_sae)))]
    dead = dead[order.to(dead.device)]
    if not len(dead):
        return dead
    loss = (batch - sae(batch)).pow(2).sum(1)  # [batch]
    drawn = torch.multinomial(loss.double().square().cpu() + 1e-30, len(dead), generator=generator)
    direction = batch[drawn.to(batch.device)] - sae.b_dec  # [n_dead, d_in]
    direction = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-8)
    alive = torch.ones(sae.cfg.d_sae, dtype=torch.bool, device=sae.W_enc.device)
    alive[dead] = False
    norm = sae.W_enc[:, alive].norm(dim=0).mean() if alive.any() else sae.W_enc.new_ones(())
    sae.W_dec[dead] = direction
    sae.W_enc[:, dead] = (0.2 * norm * direction).T
    sae.b_enc[dead] = 0
    return dead


RESAMPLERS = {"post": resample_post, "anthropic": resample_anthropic}


@torch.no_grad()
def reset_adam(optimizer: torch.optim.Adam, sae: TrainingSAE, dead: Tensor) -> None:
    """Zero Adam's moments of the dead latents' weights: old momentum would undo the new draw (part of Anthropic's recipe)."""
    for name, at in (("W_enc", (slice(None), dead)), ("W_dec", dead), ("b_enc", dead)):
        state = optimizer.state.get(getattr(sae, name), {})
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in state:
                state[moment][at] = 0
