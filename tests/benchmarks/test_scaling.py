"""How the time of a TopK step grows with width, k and tokens in a batch, beside one encoder matmul."""

import pytest
import torch
from test_steps import one_matmul, ours

D, N, K = 576, 9216, 32
AXES = {"width": [2304, 4608, 9216, 18_432, 36_864], "k": [8, 16, 32, 64, 128], "tokens": [512, 1024, 2048, 4096, 8192]}


@pytest.mark.parametrize("axis, value", [(axis, v) for axis, values in AXES.items() for v in values])
def test_scaling(measure, axis, value, monkeypatch):
    n, k = value if axis == "width" else N, value if axis == "k" else K
    monkeypatch.setattr("test_steps.BATCH", value if axis == "tokens" else 4096)
    torch.manual_seed(0)
    measure("scaling", f"{axis} {value}", "ours", ours("TopK", D, n, k), floor=one_matmul(D, n))
