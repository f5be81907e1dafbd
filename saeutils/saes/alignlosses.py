"""The three losses of AlignSAE (arXiv:2512.02004) as functions of latents; decorrelation dense and from active latents alone."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def bind_loss(slots: Tensor, relation: Tensor) -> Tensor:
    """CE(softmax(z_concept), relation), the binding loss. slots [batch, R], relation [batch] in 0…R−1."""
    return F.cross_entropy(slots, relation)


def value_loss(slots: Tensor, head: nn.Module, answer: Tensor) -> Tensor:
    """CE(V(z_concept), answer): the answer from the slots alone. ``head`` maps [batch, R] to [batch, answers] at once."""
    return F.cross_entropy(head(slots), answer)


def decorrelation(slots: Tensor, free: Tensor, eps: float = 1e-8) -> Tensor:
    """‖corr(z_concept, z_free)‖²_F over a batch, [batch, R] and [batch, n_free] → scalar.

    Only the R × n_free block of the correlation matrix is built, and ``free`` is never copied: as the slots are centred,
    the product with the raw ``free`` is the covariance already. A latent that never fires correlates with nothing.
    """
    centred = slots - slots.mean(0)
    covariance = centred.T @ free / len(free)  # [R, n_free]
    var = free.var(0, correction=0)  # [n_free]
    return (covariance.pow(2) / (centred.pow(2).mean(0)[:, None] * var + eps)).sum()


def sparse_decorrelation(
    slots: Tensor, values: Tensor, row: Tensor, latent: Tensor, n_free: int, eps: float = 1e-8
) -> Tensor:
    """:func:`decorrelation` of a free bank [batch, n_free] that is ``values`` at (row, latent), [entries], and 0 elsewhere."""
    centred, order = slots - slots.mean(0), latent.argsort(stable=True)
    row, latent, values = row[order], latent[order], values[order]
    first = torch.searchsorted(latent, torch.arange(n_free, device=latent.device))  # of each latent's entries
    covariance = F.embedding_bag(row, centred, first, per_sample_weights=values, mode="sum") / len(slots)  # [n_free, R]
    mean, square = (values.new_zeros(n_free).index_add(0, latent, v) / len(slots) for v in (values, values * values))
    var = (square - mean * mean).clamp_min(0)
    return (covariance.pow(2) / (centred.pow(2).mean(0) * var[:, None] + eps)).sum()
