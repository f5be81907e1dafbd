"""Autograd functions of SAEs that never leave the active latents: one encoder product, and sparse work on what is active."""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 256  # rows encoded at a time: their pre-activations stay in the processor's cache
DENSE_ABOVE = 1 / 8  # share of active latents above which dense products are quicker than sparse ones


def transposed(row: Tensor, column: Tensor, shape: tuple[int, int]) -> Callable[[Tensor, Tensor], Tensor]:
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


def by_latent(column: Tensor, entries: Tensor, d_sae: int) -> Tensor:
    """Sum of ``entries`` for every latent, in double precision, [d_sae]."""
    return torch.bincount(column, entries.double(), minlength=d_sae).to(entries.dtype)


class TopK(torch.autograd.Function):
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
        times = transposed(row, flat, (len(values), d_sae))
        grad_W_dec = times(values.flatten(), grad_out)
        grad_W_enc = times(entries, sae_in).T  # laid out like W_enc below
        grad_b_enc = by_latent(flat, entries, d_sae)
        grad_b_dec = grad_out.sum(0)
        if ctx.shift:
            grad_b_dec = grad_b_dec - W_enc @ grad_b_enc
        return None, grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec, None, None


class JumpReLU(torch.autograd.Function):
    """x̂ = W_decᵀ·JumpReLU_θ(W_encᵀ(x − s·b_dec) + b_enc) + b_dec and its mean L0; θ by straight-through windows.

    ``keep``: of the batch's entries above θ only so many stay, the largest (BatchTopK); None: all.
    """

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, W_dec, b_dec, threshold, bandwidth, shift, keep=None):
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
        if keep is not None and keep < len(pre):
            kept = pre.topk(keep, sorted=False).indices.sort().values  # still row by row
            row, column, pre = row[kept], column[kept], pre[kept]
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
        return None, *grads, grad_threshold, None, None, None
