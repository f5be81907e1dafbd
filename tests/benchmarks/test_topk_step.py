"""How fast is a whole TopK training step? Ratios in one run: SAELens' default step, ours, and one encoder product."""

import pytest
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

from saeutils.saes import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig
from saeutils.training import _Options, _Trainer

D, N, K, B = 576, 9216, 32, 4096
TIMES: dict[str, float] = {}


def _step(kind: str):
    torch.manual_seed(0)
    x = torch.randn(B, D)
    cfg = SAETrainerConfig(total_training_samples=B * 1000, train_batch_size_samples=B, lr=3e-4, lr_end=3e-4)
    if kind == "one encoder matmul":
        weight = torch.randn(D, N)
        return lambda: x @ weight
    if kind == "SAELens TopK, default":
        trainer = SAETrainer(cfg, TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=N, k=K)), iter([]))
    else:
        sae = SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(d_in=D, d_sae=N, k=K))
        trainer = _Trainer("", cfg, sae, _Options(), None)
    return lambda: trainer.step(x)


@pytest.mark.parametrize("kind", ["one encoder matmul", "SAELens TopK, default", "sparse_topk"])
def test_step(benchmark, kind):
    torch.set_num_threads(2)
    benchmark.pedantic(_step(kind), rounds=8, warmup_rounds=2)
    TIMES[kind] = benchmark.stats["median"]


def test_table():
    floor = TIMES["one encoder matmul"]
    print(f"\n{'':24}{'ms':>8}{'× matmul':>10}")
    for kind, seconds in TIMES.items():
        print(f"{kind:24}{seconds * 1e3:8.0f}{seconds / floor:10.2f}")
    print(f"SAELens / sparse_topk = {TIMES['SAELens TopK, default'] / TIMES['sparse_topk']:.2f}")
