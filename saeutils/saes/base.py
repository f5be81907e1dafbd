"""SAELens training classes of ours, whose backward pass never leaves the active latents.

``sparse_topk``, ``sparse_batchtopk``: TopK and BatchTopK. ``sparse_jumprelu``: JumpReLU held at a target L0.
``sparse_standard``: ReLU + L1.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sae_lens import registry
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAEConfig, JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, Step
from sae_lens.saes.sae import SAEConfig, TrainingSAE, TrainingSAEConfig, TrainStepInput, TrainStepOutput
from sae_lens.saes.standard_sae import StandardSAEConfig, StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor

from saeutils import metrics
from saeutils.kernels import sparse


class _RowsAsTheyAre:
    """Settings of SAEs that do not normalise: their sparse pass sees rows as they come."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize_activations != "none":
            name = self.architecture()
            raise ValueError(f"{name} takes normalised batches: set normalize_activations='none' and see fold_scale")


@dataclass
class _UnitDecoder(_RowsAsTheyAre):
    """Settings of SAEs whose decoder rows are expected at unit norm (``train`` keeps them there), not rescaled."""

    rescale_acts_by_decoder_norm: bool = False
    decoder_init_norm: float | None = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self.architecture()
        if self.rescale_acts_by_decoder_norm:
            raise ValueError(f"{name} keeps decoder rows at unit norm: set rescale_acts_by_decoder_norm=False")
        if not 0 < self.k <= self.d_sae:
            raise ValueError(f"k={self.k} must lie between 1 and d_sae={self.d_sae}")


class _Sparse:
    """Passes over active latents only, and W_enc held column-major: what is found are its columns, gradients are born so."""

    def __init__(self, cfg: TrainingSAEConfig, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self.W_enc.data = self.W_enc.data.T.contiguous().T

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()  # safetensors wants row-major

    def sparse_forward(
        self,
        x: Tensor,
        threshold: Tensor | None = None,
        bandwidth: float = 0.0,
        k: int | None = None,
        keep: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [batch, d_in] → reconstruction, L0, the active latents' values [entries], and these as a COO tensor, detached.

        See :class:`saeutils.kernels.sparse.Active`; no ``threshold``: 0.
        """
        threshold = self.b_enc.new_zeros(self.cfg.d_sae) if threshold is None else threshold
        weights, shift = (self.W_enc, self.b_enc, self.W_dec, self.b_dec), self.cfg.apply_b_dec_to_input
        out, l0, values, row, column = sparse.Active.apply(x, *weights, threshold, bandwidth, shift, k, keep)
        return out, l0, values, sparse.coo(row, column, values, (len(x), self.cfg.d_sae))


@torch.no_grad()
def many_active(sae: TrainingSAE, x: Tensor) -> bool:
    """Are dense products quicker? Judged by the first rows of ``x`` [batch, d_in] and about 512 latents."""
    some = slice(None, None, max(1, sae.cfg.d_sae // 512))
    pre = sae.process_sae_in(x[:16]) @ sae.W_enc[:, some] + sae.b_enc[some]
    floor = sae.threshold[some] if hasattr(sae, "threshold") else 0.0
    return float((pre > floor).float().mean()) > sparse.DENSE_ABOVE


@dataclass
class SparseTopKTrainingSAEConfig(_UnitDecoder, TopKTrainingSAEConfig):
    """SAELens' TopK settings; decoder rows are expected at unit norm (``train`` keeps them there), not rescaled."""

    @classmethod
    def architecture(cls) -> str:
        return "sparse_topk"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopKSAEConfig


class SparseTopKTrainingSAE(_Sparse, TopKTrainingSAE):
    """TopK SAE (Gao et al. 2024, arXiv:2406.04093) with the loss and gradients of SAELens' TopK at a fraction of its time.

    Dense work is one encoder product; decoding and both weight gradients touch the k active latents of each row only.
    The auxiliary loss is that of SAELens, restricted to the columns of dead latents. ``encode`` and ``decode`` are
    SAELens' own. Saved as an ordinary ``topk`` SAE.
    """

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """As in SAELens; ``feature_acts`` is a sparse COO tensor, ``hidden_pre`` its values."""
        x = step_input.sae_in.to(self.dtype)
        sae_out, _, values, acts = self.sparse_forward(x, k=self.cfg.k)
        mse = metrics.squared_error(sae_out, x)
        aux = aux_loss(self, x, sae_out, step_input.dead_neuron_mask, self.cfg.aux_loss_coefficient)
        losses = {"mse_loss": mse, "auxiliary_reconstruction_loss": aux}
        return TrainStepOutput(x, sae_out, acts, values, mse + aux, losses)


def aux_k_loss(pre: Tensor, W_dec: Tensor, residual: Tensor) -> Tensor:
    """Auxiliary loss of dead latents (Gao et al. 2024, appendix A.2), weighted as SAELens does; what ties with the last counts.

    Args:
        pre: pre-activations of the dead latents, [batch, n_dead].
        W_dec: their decoder rows, [n_dead, d_in].
        residual: x − x̂, detached, [batch, d_in].
    """
    n_dead, k_aux = len(W_dec), residual.shape[1] // 2
    weight = min(n_dead / k_aux, 1.0)
    if n_dead > k_aux:
        at = n_dead - k_aux
        if pre.device.type == "cpu" and pre.dtype == torch.float32:  # numpy partitions seven times as fast as PyTorch
            least = torch.from_numpy(np.partition(pre.detach().numpy(), at, axis=1)[:, at : at + 1])
        else:
            least = pre.detach().kthvalue(at + 1, dim=1, keepdim=True).values
        pre = pre * (pre >= least)
    return weight * metrics.squared_error(pre @ W_dec, residual)


def aux_loss(sae: TrainingSAE, x: Tensor, sae_out: Tensor, dead: Tensor | None, coefficient: float) -> Tensor:
    """:func:`aux_k_loss` of ``sae``'s dead latents (mask [d_sae]) on x [batch, d_in], times ``coefficient``."""
    if dead is None or not coefficient or not dead.any():
        return x.new_zeros(())
    # gathered as rows, which is how W_enc lies: gradients of columns would be scattered number by number
    W_enc, b_enc, W_dec = (t.index_select(0, dead.nonzero()[:, 0]) for t in (sae.W_enc.T, sae.b_enc, sae.W_dec))
    shift = sae.b_dec if sae.cfg.apply_b_dec_to_input else torch.zeros_like(sae.b_dec)
    # adds nothing, and gives b_dec its gradient without a product of the whole batch
    b_enc = b_enc + (shift.detach() - shift) @ W_enc.detach().T
    pre = torch.addmm(b_enc, x - shift.detach(), W_enc.T)  # [batch, n_dead]
    return coefficient * aux_k_loss(pre, W_dec, (x - sae_out).detach())


@dataclass
class SparseBatchTopKTrainingSAEConfig(_UnitDecoder, BatchTopKTrainingSAEConfig):
    """SAELens' BatchTopK settings; decoder rows are expected at unit norm (``train`` keeps them there), not rescaled."""

    @classmethod
    def architecture(cls) -> str:
        return "sparse_batchtopk"


class SparseBatchTopKTrainingSAE(_Sparse, BatchTopKTrainingSAE):
    """BatchTopK SAE (Bussmann et al. 2024, arXiv:2412.06410) with the loss and gradients of SAELens' BatchTopK.

    The batch's ⌊k·batch⌋ largest activations are found among those above a guess, nine tenths of the last batch's
    smallest; where the guess leaves too few it is lowered, so the choice is exact. Saved as a ``jumprelu`` SAE.
    """

    level = 0.0  # the smallest activation kept in the last batch

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """As in SAELens; sparse while few latents are active: then ``feature_acts`` is a sparse COO tensor."""
        x, cfg = step_input.sae_in.to(self.dtype), self.cfg
        if cfg.k / cfg.d_sae > sparse.DENSE_ABOVE:
            return super().training_forward_pass(step_input)
        keep, guess = int(cfg.k * len(x)), 0.9 * self.level or self._first_guess(x)
        for lower in (guess, guess / 2, guess / 4, 0.0):
            sae_out, _, values, acts = self.sparse_forward(x, self.b_enc.new_full((cfg.d_sae,), lower), keep=keep)
            if len(values) >= keep or not lower:
                break
        values = values.detach()
        self.level = float(values.min()) if len(values) else 0.0
        mse = metrics.squared_error(sae_out, x)
        aux = aux_loss(self, x, sae_out, step_input.dead_neuron_mask, self.cfg.aux_loss_coefficient)
        self.update_topk_threshold(values)
        losses = {"mse_loss": mse, "auxiliary_reconstruction_loss": aux}
        shown = {"topk_threshold": self.topk_threshold}
        return TrainStepOutput(x, sae_out, acts, values, mse + aux, losses, shown)

    @torch.no_grad()
    def _first_guess(self, x: Tensor) -> float:
        pre = self.process_sae_in(x[:64]) @ self.W_enc + self.b_enc  # [64, d_sae]
        return 0.9 * float(pre.relu().flatten().topk(int(self.cfg.k * len(pre)) or 1).values[-1])


@dataclass
class SparseJumpReLUTrainingSAEConfig(_RowsAsTheyAre, JumpReLUTrainingSAEConfig):
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

    @classmethod
    def architecture(cls) -> str:
        return "sparse_jumprelu"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUSAEConfig


class SparseJumpReLUTrainingSAE(_Sparse, JumpReLUTrainingSAE):
    """JumpReLU SAE (Rajamanoharan et al. 2024, arXiv:2407.14435) with loss ‖x − x̂‖² + λ·(L0/target − 1)².

    L0 is the batch's mean, as in ``dictionary_learning``; SAELens' quadratic mode takes it row by row, which also
    punishes its spread. Both halves of the straight-through window around θ carry gradient, as in the paper;
    ``dictionary_learning`` feeds its step the activations after the jump, which leaves the upper half only.
    Saved as an ordinary ``jumprelu`` SAE.
    """

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """As in SAELens; sparse while few latents are active: then ``feature_acts`` is a sparse COO tensor."""
        self.threshold.data.clamp_(min=0.0)
        x, cfg = step_input.sae_in.to(self.dtype), self.cfg
        if many_active(self, x):
            return super().training_forward_pass(step_input)
        sae_out, l0, values, acts = self.sparse_forward(x, self.threshold, cfg.jumprelu_bandwidth)
        losses = {"mse_loss": metrics.squared_error(sae_out, x), "l0_loss": self._l0_loss(l0, step_input)}
        return TrainStepOutput(x, sae_out, acts, values, sum(losses.values()), losses)

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """The L0 loss of the dense path."""
        l0 = Step.apply(hidden_pre, self.threshold, self.bandwidth, False).sum(-1).mean()
        return {"l0_loss": self._l0_loss(l0, step_input)}

    def _l0_loss(self, l0: Tensor, step_input: TrainStepInput) -> Tensor:
        return step_input.coefficients["l0"] * (l0 / self.cfg.target_l0 - 1).pow(2)


@dataclass
class SparseStandardTrainingSAEConfig(_RowsAsTheyAre, StandardTrainingSAEConfig):
    """SAELens' settings of ReLU + L1."""

    @classmethod
    def architecture(cls) -> str:
        return "sparse_standard"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return StandardSAEConfig


class SparseStandardTrainingSAE(_Sparse, StandardTrainingSAE):
    """ReLU + L1 SAE (Bricken et al. 2023) with the loss and gradients of SAELens' ``standard``, saved as one.

    From random weights half of all latents are active, so it starts with SAELens' dense pass.
    """

    @property
    def dense_only(self) -> bool:
        """The sparse pass knows the L1 norm only."""
        return self.cfg.lp_norm != 1

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """As in SAELens; sparse once few latents are active: then ``feature_acts`` is a sparse COO tensor."""
        x = step_input.sae_in.to(self.dtype)
        if self.dense_only or many_active(self, x):
            return super().training_forward_pass(step_input)
        sae_out, _, values, acts = self.sparse_forward(x)
        losses = {"mse_loss": metrics.squared_error(sae_out, x)}
        losses |= self.sparse_losses(step_input, values, *acts._indices())
        return TrainStepOutput(x, sae_out, acts, values, sum(losses.values()), losses)

    def sparse_losses(
        self, step_input: TrainStepInput, values: Tensor, row: Tensor, column: Tensor
    ) -> dict[str, Tensor]:
        """What ``calculate_aux_loss`` gives, from the active latents' ``values`` at (row, column), [entries]."""
        norms = self.W_dec.norm(dim=1).index_select(0, column)
        return {"l1_loss": step_input.coefficients["l1"] * (values * norms).sum() / len(step_input.sae_in)}


for _name, _sae, _cfg in (
    ("sparse_topk", SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig),
    ("sparse_batchtopk", SparseBatchTopKTrainingSAE, SparseBatchTopKTrainingSAEConfig),
    ("sparse_jumprelu", SparseJumpReLUTrainingSAE, SparseJumpReLUTrainingSAEConfig),
    ("sparse_standard", SparseStandardTrainingSAE, SparseStandardTrainingSAEConfig),
):
    if _name not in registry.SAE_TRAINING_CLASS_REGISTRY:
        registry.register_sae_training_class(_name, _sae, _cfg)
