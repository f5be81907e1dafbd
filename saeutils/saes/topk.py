"""TopK SAEs (Gao et al. 2024, arXiv:2406.04093) whose backward pass never leaves the active latents."""

from dataclasses import dataclass

from sae_lens.saes.sae import SAEConfig, TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig

from saeutils import metrics
from saeutils.saes.base import Sparse, UnitDecoder, aux_loss, register


@dataclass
class SparseTopKTrainingSAEConfig(UnitDecoder, TopKTrainingSAEConfig):
    """SAELens' TopK settings; decoder rows are expected at unit norm (``train`` keeps them there), not rescaled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k != int(self.k):
            raise ValueError(f"k={self.k} must be a whole number")
        self.k = int(self.k)

    @classmethod
    def architecture(cls) -> str:
        return "sparse_topk"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopKSAEConfig


class SparseTopKTrainingSAE(Sparse, TopKTrainingSAE):
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


register("sparse_topk", SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig)
