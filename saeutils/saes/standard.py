"""ReLU + L1 SAEs (Bricken et al. 2023) whose passes are sparse once few latents are active."""

from dataclasses import dataclass

from sae_lens.saes.sae import SAEConfig, TrainStepInput, TrainStepOutput
from sae_lens.saes.standard_sae import StandardSAEConfig, StandardTrainingSAE, StandardTrainingSAEConfig
from torch import Tensor

from saeutils import metrics
from saeutils.saes.base import RowsAsTheyAre, Sparse, many_active, register


@dataclass
class SparseStandardTrainingSAEConfig(RowsAsTheyAre, StandardTrainingSAEConfig):
    """SAELens' settings of ReLU + L1."""

    @classmethod
    def architecture(cls) -> str:
        return "sparse_standard"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return StandardSAEConfig


class SparseStandardTrainingSAE(Sparse, StandardTrainingSAE):
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


register("sparse_standard", SparseStandardTrainingSAE, SparseStandardTrainingSAEConfig)
