"""What the SAEs of this room share: settings, passes over active latents only, the auxiliary loss of dead latents."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import registry
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from torch import Tensor

from saeutils import metrics
from saeutils.kernels import files, sparse


def register(name: str, sae: type[TrainingSAE], cfg: type[TrainingSAEConfig]) -> None:
    """Tell SAELens of a training class, once: it refuses a second time, which a reloaded module would be."""
    if name not in registry.SAE_TRAINING_CLASS_REGISTRY:
        registry.register_sae_training_class(name, sae, cfg)


class SavedWhole:
    """Saving in SAELens' two files: a kill leaves the folder as it was, or without its settings, which SAELens does not load."""

    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        return _saved(super().save_model, Path(path))

    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        return _saved(super().save_inference_model, Path(path))


def _saved(save: Callable[[str], tuple[Path, Path]], folder: Path) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=files.WRITING) as tmp:
        weights, settings = save(tmp)
        (folder / settings.name).unlink(missing_ok=True)  # the old settings never stand beside the new weights
        for file in (weights, settings):
            os.replace(file, folder / file.name)
    return folder / weights.name, folder / settings.name


class RowsAsTheyAre:
    """Settings of SAEs that do not normalise: their sparse pass sees rows as they come."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize_activations != "none":
            name = self.architecture()
            raise ValueError(f"{name} takes normalised batches: set normalize_activations='none' and see fold_scale")


@dataclass
class UnitDecoder(RowsAsTheyAre):
    """Settings of SAEs whose decoder rows are expected at unit norm (``train`` keeps them there), not rescaled."""

    rescale_acts_by_decoder_norm: bool = False
    decoder_init_norm: float | None = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self.architecture()
        if self.rescale_acts_by_decoder_norm:
            raise ValueError(f"{name} keeps decoder rows at unit norm: set rescale_acts_by_decoder_norm=False")
        if isinstance(self.k, Tensor) and not self.k.ndim:
            self.k = self.k.item()
        if not isinstance(self.k, (Real, np.number)) or not 0 < self.k <= self.d_sae:
            raise ValueError(f"k={self.k} must lie between 1 and d_sae={self.d_sae}")


class Sparse(SavedWhole):
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
