"""An SAE as one autograd function that never leaves the active latents: a search for them, and sparse work on what is found."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saeutils.kernels import ranks, search

DENSE_ABOVE = 1 / 8  # share of active latents above which dense products are quicker than sparse ones


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PyTorch's warnings of beta state and unchecked invariants; 2.11 and 2.12 give the latter whatever is asked (pytorch#184610)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse")
        yield


def transposed(row: Tensor, column: Tensor, shape: tuple[int, int]) -> Callable[[Tensor, Tensor], Tensor]:
    """For sparse S [batch, d_sae] with entries at (row, column): ``times(entries, dense)`` = Sᵀ·dense, [d_sae, d_in]."""
    batch, d_sae = shape
    order = _order(column, d_sae)  # groups the entries by latent: rows of the transposed matrix
    crow = F.pad(torch.bincount(column, minlength=d_sae).cumsum(0), (1, 0)).int()
    sources = row[order].int()

    def times(entries: Tensor, dense: Tensor) -> Tensor:
        with _quiet():
            matrix = torch.sparse_csr_tensor(crow, sources, entries[order], (d_sae, batch))
            out = dense.new_empty(d_sae, dense.shape[1])
            return torch.addmm(out, matrix, dense, beta=0, out=out)  # ``@`` fills it with zeros first

    return times


def _order(column: Tensor, d_sae: int) -> Tensor:
    """Stable ``argsort``; short integers are sorted by radix, three to ten times as fast."""
    if column.device.type != "cpu" or d_sae > 2**16:
        return column.int().argsort(stable=True)
    return torch.from_numpy(column.numpy().astype(np.uint16).argsort(kind="stable"))


def by_latent(column: Tensor, entries: Tensor, d_sae: int) -> Tensor:
    """Sum of ``entries`` for every latent, in double precision, [d_sae]."""
    return torch.bincount(column, entries.double(), minlength=d_sae).to(entries.dtype)


def coo(row: Tensor, column: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Active latents as a sparse COO tensor [batch, d_sae], detached."""
    with _quiet():
        return torch.sparse_coo_tensor(torch.stack([row, column]), values.detach(), shape, check_invariants=False)


class Active(torch.autograd.Function):
    """x̂ = W_decᵀ·JumpReLU_θ(W_encᵀ(x − s·b_dec) + b_enc) + b_dec and its mean L0; θ by straight-through windows.

    ``k``: of each row's entries above θ only so many stay, the largest (TopK); ``keep``: of the batch's, all processes' (BatchTopK).
    Returns x̂, L0, and of the entries that are active or inside the window below θ, row by row, value, row and latent.
    """

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, W_dec, b_dec, threshold, bandwidth, shift, k=None, keep=None):
        sae_in = x - b_dec if shift else x  # [batch, d_in]
        found = search.passing(sae_in, W_enc.T, b_enc, floor=threshold - bandwidth / 2, k=k)
        row, column, pre = (torch.cat(p) for p in zip(*found))  # [entries]
        if keep is not None and (keep < len(pre) or ranks.world() > 1):
            kept = ranks.largest(pre, keep)  # still row by row
            row, column, pre = row[kept], column[kept], pre[kept]
        active = pre > threshold[column]
        values = pre * active
        first = F.pad(torch.bincount(row, minlength=len(x)).cumsum(0)[:-1], (1, 0))
        decoded = F.embedding_bag(column, W_dec, first, per_sample_weights=values, mode="sum")
        window = (pre - threshold[column]).abs() < bandwidth / 2
        ctx.save_for_backward(sae_in, row, column, values, active, window, W_enc, W_dec, threshold)
        ctx.shift, ctx.bandwidth = shift, bandwidth
        ctx.mark_non_differentiable(row, column)
        return decoded + b_dec, active.sum() / x.new_tensor(len(x)), values, row, column

    @staticmethod
    def backward(ctx, grad_out, grad_l0, grad_values, _row, _column):
        sae_in, row, column, values, active, window, W_enc, W_dec, threshold = ctx.saved_tensors
        direct = search.dots(grad_out, W_dec, row, column) + grad_values
        grad_pre, d_sae = direct * active, W_enc.shape[1]
        times = transposed(row, column, (len(sae_in), d_sae))
        grad_b_enc = by_latent(column, grad_pre, d_sae)
        grad_threshold = None
        if ctx.needs_input_grad[5]:
            through = -(threshold[column] * direct + grad_l0 / len(sae_in)) * window / ctx.bandwidth
            grad_threshold = by_latent(column, through, d_sae)
        grad_b_dec = grad_out.sum(0)
        if ctx.shift:
            grad_b_dec = grad_b_dec - W_enc @ grad_b_enc
        grads = times(grad_pre, sae_in).T, grad_b_enc, times(values, grad_out), grad_b_dec
        return None, *grads, grad_threshold, None, None, None, None
