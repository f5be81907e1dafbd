"""What does adapting the biases cost? Counting and updates alone, beside a step whose biases are left alone."""

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput
from torch.nn.functional import normalize

from saeutils.lm.models import default_device
from saeutils.saes import gba

D, N, L0, BATCH = 640, 8192, 64, 4096


@pytest.fixture(scope="module")
def parts():
    """A step without adaptation, and fifty steps' worth of adaptation: the difference of two whole steps drowns in noise."""
    device, seen = default_device(), {}
    x = normalize(torch.randn(BATCH, D, generator=torch.Generator().manual_seed(0)), dim=1).to(device)
    shape = gba.geometric(1.0, 0.01, 16)
    frequencies = [L0 / N * v * len(shape) / sum(shape) for v in shape]
    sae = gba.GBATrainingSAE(
        gba.GBATrainingSAEConfig(d_in=D, d_sae=N, frequencies=frequencies, every=50, device=device)
    )
    sae.calibrate(x)
    optimizer, observe = torch.optim.Adam(sae.parameters(), lr=1e-6, fused=True), sae.observe
    sae.observe = lambda y, column=None: seen.update(y=y, column=column)  # the same step, nothing counted

    def step() -> None:
        out = sae.training_forward_pass(TrainStepInput(x, {}, None, 1, False))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def fifty() -> None:
        for _ in range(50):
            observe(seen["y"], seen["column"])
        sae.seen += 50 * BATCH
        sae.adapt()

    step()
    return {"a step, biases left alone": (step, 1), "adaptation of a step": (fifty, 50)}


@pytest.mark.parametrize("row", ["a step, biases left alone", "adaptation of a step"])
def test_overhead_of_adaptation(measure, parts, row):
    function, per = parts[row]
    measure("gba", row, "ours", function, rounds=15, per=per)
