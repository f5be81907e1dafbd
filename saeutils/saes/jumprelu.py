"""JumpReLU SAEs (Rajamanoharan et al. 2024, arXiv:2407.14435) held at a target L0."""

from dataclasses import dataclass

from sae_lens.saes.jumprelu_sae import JumpReLUSAEConfig, JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, Step
from sae_lens.saes.sae import SAEConfig, TrainStepInput, TrainStepOutput
from torch import Tensor

from saeutils import metrics
from saeutils.kernels import ranks
from saeutils.kernels.door import door
from saeutils.saes.base import RowsAsTheyAre, Sparse, many_active, register


@dataclass
class SparseJumpReLUTrainingSAEConfig(RowsAsTheyAre, JumpReLUTrainingSAEConfig):
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
        door(target_l0=self.target_l0)
        if self.target_l0 >= self.d_sae:
            raise ValueError(f"target_l0={self.target_l0} must lie between 0 and d_sae={self.d_sae}")

    @classmethod
    def architecture(cls) -> str:
        return "sparse_jumprelu"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUSAEConfig


class SparseJumpReLUTrainingSAE(Sparse, JumpReLUTrainingSAE):
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
        l0 = l0 + (ranks.mean(l0) - l0).detach()  # of all processes' rows, with the gradient of these
        return step_input.coefficients["l0"] * (l0 / self.cfg.target_l0 - 1).pow(2)


register("sparse_jumprelu", SparseJumpReLUTrainingSAE, SparseJumpReLUTrainingSAEConfig)
