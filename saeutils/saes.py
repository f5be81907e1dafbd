"""SAELens training classes of ours. ``sparse_topk``: TopK training whose backward pass never leaves the k active latents."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sae_lens import registry
from sae_lens.saes.sae import SAEConfig, TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor

ROWS = 256  # rows encoded at a time: their pre-activations stay in the processor's cache


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
        d_sae, k = W_enc.shape[1], values.shape[1]
        flat = indices.flatten()
        order = flat.argsort(stable=True)  # groups the entries by latent: rows of the transposed sparse matrix
        crow = F.pad(torch.bincount(flat, minlength=d_sae).cumsum(0), (1, 0)).int()
        column = (order // k).int()

        def transposed_times(entries: Tensor, dense: Tensor) -> Tensor:
            """Sᵀ·dense, where S [batch, d_sae] holds ``entries`` at ``indices``; gives [d_sae, d_in]."""
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse")
                s = torch.sparse_csr_tensor(crow, column, entries.flatten()[order], (d_sae, len(values)))
                return s @ dense

        grad_W_dec = transposed_times(values, grad_out)
        grad_W_enc = transposed_times(grad_pre, sae_in).T  # laid out like W_enc below
        grad_b_enc = torch.bincount(flat, grad_pre.flatten().double(), minlength=d_sae).to(values.dtype)
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


if "sparse_topk" not in registry.SAE_TRAINING_CLASS_REGISTRY:
    registry.register_sae_training_class("sparse_topk", SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig)
