"""Starting points for the weights of any SAELens SAE."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from sae_lens.saes.sae import SAE
from torch import Tensor

from saeutils.kernels.door import door
from saeutils.lm import parts, provenance
from saeutils.saes.jumprelu import SparseJumpReLUTrainingSAE, SparseJumpReLUTrainingSAEConfig

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@torch.no_grad()
def geometric_median(x: Tensor, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least summed distance to the rows of ``x`` [n, d] → [d]; Weiszfeld's fixed point.

    Start of ``b_dec`` in Bricken et al. 2023 ("Towards Monosemanticity") and Gao et al. 2024.

    Raises:
        ValueError: no rows, NaN or inf.
    """
    door(x=x, iterations=iterations, tolerance=tolerance)
    x = x if x.dtype == torch.float64 else x.float()
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
    door(sae=sae, x=x)
    sae.b_dec.copy_(geometric_median(x.to(sae.b_dec)))


@torch.no_grad()
def tie(sae: SAE) -> None:
    """Unit decoder rows and W_enc = W_decᵀ, in place (the memory layout of W_enc stays)."""
    door(sae=sae)
    sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8)
    sae.W_enc.copy_(sae.W_dec.T)


def _decoder(sae: SAE, rows: Tensor) -> None:
    """Decoder ``rows`` [d_sae, d_in] at norm 1, encoder tied to them, no bias."""
    sae.W_dec.copy_(rows.to(sae.W_dec))
    sae.b_enc.zero_()
    tie(sae)


def _require_rows(x: Tensor, latents: int) -> None:
    if len(x) < latents:
        raise ValueError(f"{len(x):,} rows cannot start {latents:,} latents: give more")


@torch.no_grad()
def random_decoder(sae: SAE, seed: int) -> None:
    """Random directions; two SAEs given one ``seed`` share their start (the control for :func:`mirror_decoder`)."""
    door(sae=sae, seed=seed)
    _decoder(sae, torch.randn(sae.W_dec.shape, generator=torch.Generator().manual_seed(int(seed))))


@torch.no_grad()
def data_points(sae: SAE, x: Tensor, seed: int) -> None:
    """Random rows of ``x`` [n, d_in] less ``b_dec`` as directions.

    Raises:
        ValueError: fewer rows than latents.
    """
    door(sae=sae, x=x, seed=seed)
    _require_rows(x, sae.cfg.d_sae)
    picked = torch.randperm(len(x), generator=torch.Generator().manual_seed(int(seed)))[: sae.cfg.d_sae]
    _decoder(sae, x[picked].to(sae.b_dec) - sae.b_dec)


@torch.no_grad()
def k_means(sae: SAE, x: Tensor, seed: int) -> None:
    """Centres of spherical mini-batch k-means on ``x`` [n, d_in] less ``b_dec``, one a latent.

    Raises:
        ValueError: fewer rows than latents.
    """
    door(sae=sae, x=x, seed=seed)
    _require_rows(x, sae.cfg.d_sae)
    from sklearn.cluster import MiniBatchKMeans  # late: a second to import, and one function needs it

    unit = torch.nn.functional.normalize(x.to(sae.b_dec) - sae.b_dec, dim=1).cpu().numpy()
    model = MiniBatchKMeans(sae.cfg.d_sae, init="random", batch_size=4096, max_iter=5, n_init=1, random_state=seed)
    _decoder(sae, torch.from_numpy(model.fit(unit).cluster_centers_))


@torch.no_grad()
def mlp_directions(lm: TransformerBridge, layer: int) -> Tensor:
    """What each neuron of a block's MLP writes to the residual stream: U_dec as rows, [d_mlp, d_model], float32.

    The MLP adds Σ_i σ_i·u_i + c to the stream. Where the block norms the MLP's output (Gemma 2 and 3), it adds that sum
    divided by its root mean square of the token, and then scaled per coordinate by the norm's weight: the weight belongs
    to the direction, the division is one number a token. Which norm that is, and that there is nothing else in between, is
    measured on rows: :func:`saeutils.lm.parts.mlp_gain`.

    Raises:
        ValueError: no such block, one without a single MLP (mixtures of experts, attention only), or one whose MLP's output is
            changed by more than a norm.
    """
    door(lm=lm, layer=layer)
    if not 0 <= layer < len(lm.blocks):
        raise ValueError(f"block {layer}: the model has blocks 0…{len(lm.blocks) - 1}")
    block = lm.blocks[layer]
    U = getattr(getattr(block, "mlp", None), "W_out", None)
    if U is None or U.ndim != 2:
        raise ValueError(f"block {layer} has no MLP with one output matrix: mirror_decoder needs one, use data_points")
    U = U.detach().float()
    return U * parts.mlp_gain(lm, layer, U)


@torch.no_grad()
def mirror_decoder(sae: SAE, lm: TransformerBridge, layer: int) -> None:
    """SAE-MD (seed 002): decoder [U_dec, −U_dec] of the block's MLP at norm 1, encoder tied to it; then :func:`calibrate`.

    Raises:
        ValueError: d_sae is not twice the MLP's width, d_in not the model's; a block without an MLP.
    """
    door(sae=sae, lm=lm, layer=layer)
    U = mlp_directions(lm, layer)
    if (2 * len(U), U.shape[1]) != (sae.cfg.d_sae, sae.cfg.d_in):
        raise ValueError(
            f"the mirrored MLP of block {layer} has d_sae = {2 * len(U)}, d_in = {U.shape[1]}; the SAE has "
            f"{sae.cfg.d_sae} and {sae.cfg.d_in}: build the SAE with the former"
        )
    _decoder(sae, torch.cat([U, -U]))


@torch.no_grad()
def residual_mirror_decoder(
    sae: SAE, lm: TransformerBridge, layer: int, x: Tensor, seed: int = 0, share: float = 0.5
) -> None:
    """Mirror decoder with room for the stream that the MLP does not write (the paper's future work).

    ``share`` of the width goes to ±u_i of the neurons along which rows ``x`` [n, d_in] less ``b_dec`` vary most, the rest
    to data points with their projection on the span of what the MLP writes strongest (its leading d_in/2 directions) removed.

    Raises:
        ValueError: share not in (0, 1), fewer rows than latents left, a block without an MLP.
    """
    door(sae=sae, lm=lm, layer=layer, x=x, seed=seed, share=share)
    U = torch.nn.functional.normalize(mlp_directions(lm, layer), dim=1).to(sae.b_dec)
    pairs = int(share * sae.cfg.d_sae / 2)
    if not 0 < pairs <= min(len(U), (sae.cfg.d_sae - 1) // 2):
        raise ValueError(
            f"share={share} of d_sae={sae.cfg.d_sae} must be 1…{len(U)} mirrored pairs and leave some room"
        )
    rest, centred = sae.cfg.d_sae - 2 * pairs, x.to(sae.b_dec) - sae.b_dec
    _require_rows(x, rest)
    varied = (centred @ U.T).pow(2).mean(0).topk(pairs).indices
    V = torch.linalg.svd(U[varied], full_matrices=False).Vh[: sae.cfg.d_in // 2]  # [d_in/2, d_in]
    picked = centred[torch.randperm(len(x), generator=torch.Generator().manual_seed(int(seed)))[:rest]]
    _decoder(sae, torch.cat([U[varied], -U[varied], picked - picked @ V.T @ V]))


@torch.no_grad()
def firing_levels(sae_in: Tensor, W_enc: Tensor, counts: Tensor) -> Tensor:
    """What each latent's projection exceeds on ``counts`` [d_sae] of the rows ``sae_in`` [n, d_in], [d_sae].

    Midway between the last row inside and the first outside; at least one row is inside and one outside.
    """
    levels = torch.empty(len(counts), dtype=sae_in.dtype, device=sae_in.device)
    for at in range(0, len(counts), 512):
        part = slice(at, at + 512)
        k = counts[part].clamp(1, len(sae_in) - 1)
        top = (sae_in @ W_enc[:, part]).topk(int(k.max()) + 1, dim=0).values  # [k + 1, 512]
        levels[part] = top.gather(0, torch.stack([k - 1, k])).mean(0)
    return levels


@torch.no_grad()
def calibrate(sae: SAE, x: Tensor, l0: float) -> None:
    """Start a JumpReLU SAE at the L0 it shall keep, in place: thresholds per latent, then one gain for the encoder.

    Every latent gets the threshold that it passes on l0/d_sae of the rows ``x`` [n, d_in]; without it, directions of
    unequal projection (an MLP's columns) leave few latents firing always and the rest dead. The gain minimises
    ‖x − b_dec − g·ẑ‖², as the sum of tied, correlated latents overshoots.

    Raises:
        ValueError: an SAE without thresholds, too few rows for the rate, more active latents asked for than are positive.
    """
    door(sae=sae, x=x, l0=l0)
    l0 = float(l0)
    if not hasattr(sae, "threshold"):
        raise ValueError(f"{type(sae).__name__} has no thresholds: calibrate takes JumpReLU SAEs")
    if (k := round(len(x) * l0 / sae.cfg.d_sae)) < 1:
        raise ValueError(f"{len(x)} rows are too few for a rate of {l0}/{sae.cfg.d_sae}: give {sae.cfg.d_sae / l0:.0f}")
    x = x.to(sae.b_dec)
    sae_in = x - sae.b_dec if sae.cfg.apply_b_dec_to_input else x
    counts = torch.full((sae.cfg.d_sae,), k, device=x.device)
    sae.threshold.copy_((firing_levels(sae_in, sae.W_enc, counts) + sae.b_enc).clamp_min(0))
    dot = norm = active = 0.0
    for part in x.split(1024):
        acts = sae.encode(part)
        active += float((acts > 0).sum()) / len(x)
        out = sae.decode(acts) - sae.b_dec
        dot, norm = dot + float((out * (part - sae.b_dec)).sum()), norm + float(out.pow(2).sum())
    if active < 0.9 * l0:
        raise ValueError(
            f"L0 {l0:g} cannot be reached: {active:.0f} latents are positive on a row; lower it or widen the SAE"
        )
    if norm:
        for parameter in (sae.W_enc, sae.b_enc, sae.threshold):
            parameter *= max(dot / norm, 1e-3)


def start_jumprelu(
    d_sae: int, l0: float, x: Tensor, decoder: Callable[[SAE], None], **settings
) -> SparseJumpReLUTrainingSAE:
    """A JumpReLU SAE ready to train at its target L0 on rows like ``x`` [n, d_in] (root mean squared norm 1).

    ``b_dec`` at the geometric median, directions by ``decoder(sae)`` (one of this module's functions with its other
    arguments filled in), then :func:`calibrate`. ``settings`` go to :class:`SparseJumpReLUTrainingSAEConfig`.
    """
    door(d_sae=d_sae, l0=l0, x=x, decoder=decoder)
    cfg = SparseJumpReLUTrainingSAEConfig(
        d_in=x.shape[1], d_sae=d_sae, target_l0=float(l0), device=str(x.device), apply_b_dec_to_input=True, **settings
    )
    sae = SparseJumpReLUTrainingSAE(cfg)
    decoder_bias_at_median(sae, x)
    decoder(sae)
    calibrate(sae, x, l0)
    return sae


@torch.no_grad()
def fold_scale(sae: SAE, scale: float, shift: Tensor | None = None) -> None:
    """Make an SAE trained on (x − shift)·scale, shift [d_in], take x itself, in place; decoder norms stay, latents shrink by 1/scale.

    Exact for encoders that are positively homogeneous in (input, bias), such as ReLU and TopK:
    f(s·z; b) = s·f(z; b/s). Thresholds, where there are any, shrink with the biases.

    Raises:
        ValueError: a shift with an SAE that does not subtract ``b_dec`` from its input; what
            :func:`saeutils.lm.provenance.require_foldable` refuses.
    """
    door(sae=sae, scale=scale)
    provenance.require_foldable(sae, scale, shift is not None)
    if shift is not None and not sae.cfg.apply_b_dec_to_input:
        raise ValueError("a shift can be folded only where apply_b_dec_to_input=True")
    sae.b_enc /= scale
    sae.b_dec /= scale
    if shift is not None:
        sae.b_dec += shift.to(sae.b_dec)
    if hasattr(sae, "threshold"):  # JumpReLU
        sae.threshold /= scale
    if hasattr(sae, "topk_threshold"):  # BatchTopK
        sae.topk_threshold /= scale
    sae.cfg.metadata.folded = float(scale)
