"""BatchTopK SAEs (Bussmann et al. 2024, arXiv:2412.06410) whose backward pass never leaves the active latents."""

from dataclasses import dataclass

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor

from saeutils import metrics
from saeutils.kernels import ranks, sparse
from saeutils.saes.base import Sparse, UnitDecoder, aux_loss, register


@dataclass
class SparseBatchTopKTrainingSAEConfig(UnitDecoder, BatchTopKTrainingSAEConfig):
    """SAELens' BatchTopK settings; decoder rows are expected at unit norm (``train`` keeps them there), not rescaled."""

    @classmethod
    def architecture(cls) -> str:
        return "sparse_batchtopk"


class SparseBatchTopKTrainingSAE(Sparse, BatchTopKTrainingSAE):
    """BatchTopK SAE (Bussmann et al. 2024, arXiv:2412.06410) with the loss and gradients of SAELens' BatchTopK.

    The batch's ⌊k·batch⌋ largest activations are found among those above a guess, nine tenths of the last batch's
    smallest; where the guess leaves too few it is lowered, so the choice is exact. Saved as a ``jumprelu`` SAE.
    """

    level = 0.0  # the smallest activation kept in the last batch

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """As in SAELens; sparse while few latents are active: then ``feature_acts`` is a sparse COO tensor."""
        x, cfg = step_input.sae_in.to(self.dtype), self.cfg
        if cfg.k / cfg.d_sae > sparse.DENSE_ABOVE and ranks.world() == 1:
            return super().training_forward_pass(step_input)
        keep, guess = int(cfg.k * len(x) * ranks.world()), 0.9 * self.level or ranks.least(self._first_guess(x))
        for lower in (guess, guess / 2, guess / 4, 0.0):
            sae_out, _, values, acts = self.sparse_forward(x, self.b_enc.new_full((cfg.d_sae,), lower), keep=keep)
            if not lower or float(ranks.total(x.new_tensor(len(values)))) >= keep:
                break
        values = values.detach()
        least = ranks.least(float(values.min()) if len(values) else float("inf"))
        self.level = least if least < float("inf") else 0.0
        mse = metrics.squared_error(sae_out, x)
        aux = aux_loss(self, x, sae_out, step_input.dead_neuron_mask, self.cfg.aux_loss_coefficient)
        self.update_topk_threshold(values.new_tensor([self.level]))
        losses = {"mse_loss": mse, "auxiliary_reconstruction_loss": aux}
        shown = {"topk_threshold": self.topk_threshold}
        return TrainStepOutput(x, sae_out, acts, values, mse + aux, losses, shown)

    @torch.no_grad()
    def _first_guess(self, x: Tensor) -> float:
        pre = self.process_sae_in(x[:64]) @ self.W_enc + self.b_enc  # [64, d_sae]
        return 0.9 * float(pre.relu().flatten().topk(int(self.cfg.k * len(pre)) or 1).values[-1])


register("sparse_batchtopk", SparseBatchTopKTrainingSAE, SparseBatchTopKTrainingSAEConfig)
