"""SAELens training classes of ours, whose backward pass never leaves the active latents.

``sparse_topk``: TopK. ``sparse_jumprelu``: JumpReLU held at a target L0.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sae_lens import registry
from sae_lens.saes.jumprelu_sae import JumpReLUSAEConfig, JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, Step
from sae_lens.saes.sae import SAEConfig, TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor

ROWS = 256  # rows encoded at a time: their pre-activations stay in the processor's cache
DENSE_ABOVE = 1 / 8  # share of active latents above which dense products are quicker than sparse ones


def _transposed(row: Tensor, column: Tensor, shape: tuple[int, int]) -> Callable[[Tensor, Tensor], Tensor]:
    """For sparse S [batch, d_sae] with entries at (row, column): ``times(entries, dense)`` = Sᵀ·dense, [d_sae, d_in]."""
    batch, d_sae = shape
    order = column.argsort(stable=True)  # groups the entries by latent: rows of the transposed matrix
    crow = F.pad(torch.bincount(column, minlength=d_sae).cumsum(0), (1, 0)).int()
    sources = row[order].int()

    def times(entries: Tensor, dense: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse")
            return torch.sparse_csr_tensor(crow, sources, entries[order], (d_sae, batch)) @ dense

    return times


def _by_latent(column: Tensor, entries: Tensor, d_sae: int) -> Tensor:
    """Sum of ``entries`` for every latent, in double precision, [d_sae]."""
    return torch.bincount(column, entries.double(), minlength=d_sae).to(entries.dtype)


class _SparseTopK(torch.autograd.Function):
    """x̂ = W_decᵀ·TopK(ReLU(W_encᵀ(x − s·b_dec) + b_enc)) + b_dec, with gradients over active latents only."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, W_dec, b_dec, k, shift):
        sae_in = x - b_dec if shift else x  # [batch, d_in]
        values = x.new_empty(len(x), k)
        indices = torch.empty(len(x), k, dtype=torch.long, device=x.device)
        rows = len(x) if x.is_cuda else ROWS
        buffer = x.new_empty(min(rows, len(x)), W_enc.shape[1])
        for a in range(0, len(x), rows):
            b = min(a + rows, len(x))
            pre = torch.addmm(b_enc, sae_in[a:b], W_enc, out=buffer[: b - a])  # [rows, d_sae]
            values[a:b], indices[a:b] = torch.topk(pre, k, dim=1, sorted=False)
        values.relu_()
        with torch.enable_grad():  # keep embedding_bag's own graph: its gradient is the gradient of the values
            leaf = values.detach().requires_grad_()
            decoded = F.embedding_bag(indices, W_dec.detach(), per_sample_weights=leaf, mode="sum")
        ctx.save_for_backward(sae_in, values, indices, W_enc)
        ctx.leaf, ctx.decoded, ctx.shift = leaf, decoded, shift
        ctx.mark_non_differentiable(indices)
        return decoded.detach() + b_dec, values, indices

    @staticmethod
    def backward(ctx, grad_out, grad_values, _):
        sae_in, values, indices, W_enc = ctx.saved_tensors
        (direct,) = torch.autograd.grad(ctx.decoded, ctx.leaf, grad_out)
        grad_pre = torch.where(values > 0, direct + grad_values, 0.0)  # [batch, k]
        d_sae, flat, entries = W_enc.shape[1], indices.flatten(), grad_pre.flatten()
        row = torch.arange(len(values), device=flat.device).repeat_interleave(values.shape[1])
        times = _transposed(row, flat, (len(values), d_sae))
        grad_W_dec = times(values.flatten(), grad_out)
        grad_W_enc = times(entries, sae_in).T  # laid out like W_enc below
        grad_b_enc = _by_latent(flat, entries, d_sae)
        grad_b_dec = grad_out.sum(0)
        if ctx.shift:
            grad_b_dec = grad_b_dec - W_enc @ grad_b_enc
        return None, grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec, None, None


@dataclass
class SparseTopKTrainingSAEConfig(TopKTrainingSAEConfig):
    """SAELens' TopK settings; decoder rows are expected at unit norm (``train`` keeps them there), not rescaled."""

    rescale_acts_by_decoder_norm: bool = False
    decoder_init_norm: float | None = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rescale_acts_by_decoder_norm:
            raise ValueError("sparse_topk keeps decoder rows at unit norm: set rescale_acts_by_decoder_norm=False")
        if self.normalize_activations != "none":
            raise ValueError(
                "sparse_topk takes normalised batches: set normalize_activations='none' and see fold_scale"
            )
        if not 0 < self.k <= self.d_sae:
            raise ValueError(f"k={self.k} must lie between 1 and d_sae={self.d_sae}")

    @classmethod
    def architecture(cls) -> str:
        return "sparse_topk"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopKSAEConfig


class SparseTopKTrainingSAE(TopKTrainingSAE):
    """TopK SAE (Gao et al. 2024, arXiv:2406.04093) with the loss and gradients of SAELens' TopK at a fraction of its time.

    Dense work is one encoder product; decoding and both weight gradients touch the k active latents of each row only.
    The auxiliary loss is that of SAELens, restricted to the columns of dead latents. ``encode`` and ``decode`` are
    SAELens' own. Saved as an ordinary ``topk`` SAE.
    """

    def __init__(self, cfg: SparseTopKTrainingSAEConfig, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        # column-major: gradients are born as [d_sae, d_in], and a transposition would cost as much as the decoder
        self.W_enc.data = self.W_enc.data.T.contiguous().T

    def sparse_forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [batch, d_in] → reconstruction [batch, d_in], values and indices of active latents [batch, k]."""
        shift = self.cfg.apply_b_dec_to_input
        return _SparseTopK.apply(x, self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.cfg.k, shift)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """As in SAELens; ``feature_acts`` is a sparse COO tensor, ``hidden_pre`` holds the k values only."""
        x = step_input.sae_in.to(self.dtype)
        sae_out, values, indices = self.sparse_forward(x)
        mse = (sae_out - x).pow(2).sum(-1).mean()
        aux = self._sparse_aux_loss(x, sae_out, step_input.dead_neuron_mask)
        row = torch.arange(len(x), device=x.device).repeat_interleave(values.shape[1])
        acts = torch.sparse_coo_tensor(
            torch.stack([row, indices.flatten()]),
            values.detach().flatten(),
            (len(x), self.cfg.d_sae),
            check_invariants=False,
        )
        losses = {"mse_loss": mse, "auxiliary_reconstruction_loss": aux}
        return TrainStepOutput(x, sae_out, acts, values, mse + aux, losses)

    def _sparse_aux_loss(self, x: Tensor, sae_out: Tensor, dead: Tensor | None) -> Tensor:
        if dead is None or not self.cfg.aux_loss_coefficient or not (n_dead := int(dead.sum())):
            return x.new_zeros(())
        columns = dead.nonzero()[:, 0]
        sae_in = x - self.b_dec if self.cfg.apply_b_dec_to_input else x
        pre = sae_in @ self.W_enc[:, columns] + self.b_enc[columns]  # [batch, n_dead]
        return self.cfg.aux_loss_coefficient * aux_k_loss(pre, self.W_dec[columns], (x - sae_out).detach(), n_dead)

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()  # safetensors wants row-major


def aux_k_loss(pre: Tensor, W_dec: Tensor, residual: Tensor, n_dead: int) -> Tensor:
    """Auxiliary loss of dead latents (Gao et al. 2024, appendix A.2), weighted as SAELens does.

    Args:
        pre: pre-activations of the dead latents, [batch, n_dead].
        W_dec: their decoder rows, [n_dead, d_in].
        residual: x − x̂, detached, [batch, d_in].
    """
    k_aux = residual.shape[1] // 2
    weight = min(n_dead / k_aux, 1.0)
    if n_dead > k_aux:
        top = pre.topk(k_aux, dim=1, sorted=False)
        pre = torch.zeros_like(pre).scatter(1, top.indices, top.values)
    return weight * (pre @ W_dec - residual).pow(2).sum(-1).mean()


class _SparseJumpReLU(torch.autograd.Function):
    """x̂ = W_decᵀ·JumpReLU_θ(W_encᵀ(x − s·b_dec) + b_enc) + b_dec and its mean L0; θ by straight-through windows."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, W_dec, b_dec, threshold, bandwidth, shift):
        sae_in = x - b_dec if shift else x  # [batch, d_in]
        rows = len(x) if x.is_cuda else ROWS
        buffer = x.new_empty(min(rows, len(x)), W_enc.shape[1])
        edge, parts = threshold - bandwidth / 2, []
        for a in range(0, len(x), rows):
            b = min(a + rows, len(x))
            pre = torch.addmm(b_enc, sae_in[a:b], W_enc, out=buffer[: b - a])  # [rows, d_sae]
            i, j = (pre > edge).nonzero(as_tuple=True)  # active, or inside the window below the threshold
            parts.append((a + i, j, pre[i, j]))
        row, column, pre = (torch.cat(p) for p in zip(*parts))  # [entries]
        active = pre > threshold[column]
        values = pre * active
        offsets = F.pad(torch.bincount(row, minlength=len(x)).cumsum(0)[:-1], (1, 0))
        with torch.enable_grad():  # keep embedding_bag's own graph: its gradient is the gradient of the values
            leaf = values.detach().requires_grad_()
            decoded = F.embedding_bag(column, W_dec.detach(), offsets, per_sample_weights=leaf, mode="sum")
        window = (pre - threshold[column]).abs() < bandwidth / 2
        ctx.save_for_backward(sae_in, row, column, values, active, window, W_enc, threshold)
        ctx.leaf, ctx.decoded, ctx.shift, ctx.bandwidth = leaf, decoded, shift, bandwidth
        ctx.mark_non_differentiable(row, column)
        return decoded.detach() + b_dec, active.sum() / x.new_tensor(len(x)), values, row, column

    @staticmethod
    def backward(ctx, grad_out, grad_l0, grad_values, _row, _column):
        sae_in, row, column, values, active, window, W_enc, threshold = ctx.saved_tensors
        (direct,) = torch.autograd.grad(ctx.decoded, ctx.leaf, grad_out)
        direct = direct + grad_values
        grad_pre, d_sae = direct * active, W_enc.shape[1]
        times = _transposed(row, column, (len(sae_in), d_sae))
        grad_b_enc = _by_latent(column, grad_pre, d_sae)
        through = -(threshold[column] * direct + grad_l0 / len(sae_in)) * window / ctx.bandwidth
        grad_b_dec = grad_out.sum(0)
        if ctx.shift:
            grad_b_dec = grad_b_dec - W_enc @ grad_b_enc
        grads = times(grad_pre, sae_in).T, grad_b_enc, times(values, grad_out), grad_b_dec
        return None, *grads, _by_latent(column, through, d_sae), None, None


@dataclass
class SparseJumpReLUTrainingSAEConfig(JumpReLUTrainingSAEConfig):
    """SAELens' JumpReLU settings with ``target_l0`` and the defaults of SAEBench's recipe (Karvonen et al. 2025).

    Give it inputs of root mean squared norm 1 (``Activations.batches(normalise="rms")``): bandwidth and threshold are in
    their units.
    """

    target_l0: float | None = 80.0
    jumprelu_init_threshold: float = 0.001
    jumprelu_bandwidth: float = 0.001
    decoder_init_norm: float | None = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_l0 is None or not 0 < self.target_l0 < self.d_sae:
            raise ValueError(f"target_l0={self.target_l0} must lie between 0 and d_sae={self.d_sae}")
        if self.normalize_activations != "none":
            raise ValueError(
                "sparse_jumprelu takes normalised batches: normalize_activations='none' and see fold_scale"
            )

    @classmethod
    def architecture(cls) -> str:
        return "sparse_jumprelu"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUSAEConfig


class SparseJumpReLUTrainingSAE(JumpReLUTrainingSAE):
    """JumpReLU SAE (Rajamanoharan et al. 2024, arXiv:2407.14435) with loss ‖x − x̂‖² + λ·(L0/target − 1)².

    L0 is the batch's mean, as in ``dictionary_learning``; SAELens' quadratic mode takes it row by row, which also
    punishes its spread. Both halves of the straight-through window around θ carry gradient, as in the paper;
    ``dictionary_learning`` feeds its step the activations after the jump, which leaves the upper half only.
    Saved as an ordinary ``jumprelu`` SAE.
    """

    def __init__(self, cfg: SparseJumpReLUTrainingSAEConfig, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self.W_enc.data = self.W_enc.data.T.contiguous().T  # column-major, as in sparse_topk

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """As in SAELens; sparse while few latents are active: then ``feature_acts`` is a sparse COO tensor."""
        with torch.no_grad():
            self.threshold.clamp_(min=0.0)
            first, _ = self.encode_with_hidden_pre(step_input.sae_in[:16])
        if float((first > 0).float().mean()) > DENSE_ABOVE:
            return super().training_forward_pass(step_input)
        x, cfg = step_input.sae_in.to(self.dtype), self.cfg
        sae_out, l0, values, row, column = _SparseJumpReLU.apply(
            x, self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.threshold, cfg.jumprelu_bandwidth,
            cfg.apply_b_dec_to_input,
        )  # fmt: skip
        acts = torch.sparse_coo_tensor(
            torch.stack([row, column]), values.detach(), (len(x), cfg.d_sae), check_invariants=False
        )
        losses = {"mse_loss": (sae_out - x).pow(2).sum(-1).mean(), "l0_loss": self._l0_loss(l0, step_input)}
        return TrainStepOutput(x, sae_out, acts, values, sum(losses.values()), losses)

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """The L0 loss of the dense path."""
        l0 = Step.apply(hidden_pre, self.threshold, self.bandwidth, False).sum(-1).mean()
        return {"l0_loss": self._l0_loss(l0, step_input)}

    def _l0_loss(self, l0: Tensor, step_input: TrainStepInput) -> Tensor:
        return step_input.coefficients["l0"] * (l0 / self.cfg.target_l0 - 1).pow(2)

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()  # safetensors wants row-major


for _name, _sae, _cfg in (
    ("sparse_topk", SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig),
    ("sparse_jumprelu", SparseJumpReLUTrainingSAE, SparseJumpReLUTrainingSAEConfig),
):
    if _name not in registry.SAE_TRAINING_CLASS_REGISTRY:
        registry.register_sae_training_class(_name, _sae, _cfg)
