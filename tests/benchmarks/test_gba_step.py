"""What does adapting the biases cost? Ratios in one run: a GBA step with and without it, JumpReLU, one encoder product."""

from functools import partial

import pytest
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

from saeutils import gba, initializers
from saeutils.training import _Options, _Trainer

D, N, L0, B = 640, 8192, 64, 4096
TIMES: dict[str, float] = {}


class Unadapted(gba.GBATrainingSAE):
    """The same SAE with its biases left alone: nothing counted, nothing moved."""

    def observe(self, y, column=None):
        pass

    def adapt(self):
        pass


def _step(kind: str):
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(B, D), dim=1)
    cfg = SAETrainerConfig(total_training_samples=B * 1000, train_batch_size_samples=B, lr=1e-6, lr_end=1e-6)
    if kind == "one encoder matmul":
        weight = torch.randn(D, N)
        return lambda: x @ weight
    if kind == "SAELens JumpReLU":
        sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(d_in=D, d_sae=N))
        initializers.calibrate(sae, x, L0)
        return partial(SAETrainer(cfg, sae, iter([])).step, x)
    sae = (Unadapted if kind == "without adaptation" else gba.GBATrainingSAE)(
        gba.GBATrainingSAEConfig(d_in=D, d_sae=N, frequencies=gba.geometric(0.03, 0.001, 16), every=50)
    )
    sae.calibrate(x)
    trainer = _Trainer("", cfg, sae, _Options(), None)

    def step():
        trainer.step(x)
        trainer.n_training_steps += 1

    return step


@pytest.mark.parametrize("kind", ["one encoder matmul", "SAELens JumpReLU", "without adaptation", "GBA"])
def test_step(benchmark, kind):
    torch.set_num_threads(2)
    benchmark.pedantic(
        _step(kind), rounds=8 if kind in ("one encoder matmul", "SAELens JumpReLU") else 52, warmup_rounds=2
    )
    TIMES[kind] = benchmark.stats["median"] if kind != "GBA" else benchmark.stats["mean"]


def test_overhead_of_adaptation(benchmark):
    """Only what adaptation adds, alone: one count a step and one update every 50, against a whole step."""
    sae = gba.GBATrainingSAE(gba.GBATrainingSAEConfig(d_in=D, d_sae=N))
    entries = B * L0
    g = torch.Generator().manual_seed(0)
    y, column = torch.rand(entries, generator=g), torch.randint(N, (entries,), generator=g)

    def fifty():
        for _ in range(50):
            sae.observe(y, column)
        sae.seen += 50 * B
        sae.adapt()

    benchmark.pedantic(fifty, rounds=5, warmup_rounds=1)
    TIMES["adaptation alone"] = benchmark.stats["median"] / 50


def test_table():
    floor = TIMES["one encoder matmul"]
    print(f"\n{'':24}{'ms':>8}{'× matmul':>10}")
    for kind, seconds in TIMES.items():
        print(f"{kind:24}{seconds * 1e3:8.1f}{seconds / floor:10.3f}")
    print(f"adaptation / step without it = {TIMES['adaptation alone'] / TIMES['without adaptation']:.1%}")
