"""How the time of a TopK step grows with width, k and tokens in a batch, beside one encoder matmul."""

import pytest
import torch
from test_steps import ours, rows

from saeutils.models import default_device

D, N, K = 576, 9216, 32
AXES = {"width": [2304, 4608, 9216, 18_432, 36_864], "k": [8, 16, 32, 64, 128], "tokens": [512, 1024, 2048, 4096, 8192]}


@pytest.mark.parametrize("who", ["ours", "floor"])
@pytest.mark.parametrize("axis, value", [(axis, v) for axis, values in AXES.items() for v in values])
def test_scaling(measure, axis, value, who, monkeypatch):
    n, k = value if axis == "width" else N, value if axis == "k" else K
    monkeypatch.setattr("test_steps.BATCH", value if axis == "tokens" else 4096)
    torch.manual_seed(0)
    x, W = rows(D), torch.randn(D, n, device=default_device())
    measure("scaling", f"{axis} {value}", who, ours("TopK", D, n, k) if who == "ours" else lambda: x @ W)
