"""What a step does around the gradients, and memory that the process keeps."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saeutils.kernels import optim
from saeutils.saes import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig


def test_gradient_is_tangential(rows):
    torch.manual_seed(0)
    sae = SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(d_in=640, d_sae=512, k=8))
    ((sae(rows[:64]) - rows[:64]) ** 2).sum().backward()
    full = sae.W_dec.grad.clone()
    optim.remove_parallel_gradient(sae.W_dec)
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() < 1e-4 * full.norm()


def test_column_major_weights_step_as_row_major_ones():
    g = torch.Generator().manual_seed(0)
    W, grads = torch.randn(5, 7, generator=g), torch.randn(3, 5, 7, generator=g)
    weights = [torch.nn.Parameter(W.clone()), torch.nn.Parameter(W.T.contiguous().T)]
    for weight in weights:
        optimizer = torch.optim.Adam([weight], lr=0.1, fused=True)
        for grad in grads:
            weight.grad = grad.clone() if weight.is_contiguous() else grad.T.contiguous().T
            with optim.row_major(optimizer):
                optimizer.step()
        assert optimizer.state[weight]["exp_avg"].stride() == weight.stride()
    assert weights[1].stride() == (1, 5)
    torch.testing.assert_close(*weights)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_freed_memory_is_kept_for_the_next_tensor():
    code = """
import psutil, torch
from saeutils.kernels import memory
held = lambda: psutil.Process().memory_info().rss
for keep in (False, True):
    if keep:
        memory.reuse()
    x = torch.ones(2**25)
    full = held()
    del x
    print(full - held() > 2**26)
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    ).stdout
    assert out.split() == ["True", "False"]
