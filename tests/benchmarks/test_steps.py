"""One whole training step of every kind of SAE at three sizes: ours, SAELens, dictionary_learning, sparsify, one matmul.

L0 is k: ReLU SAEs of ours and of SAELens get biases at which each latent fires on k/n of the rows (a dense step takes as
long whatever is active). TopK also with one latent in twenty dead, where the auxiliary loss is paid. Rows and weights are
random, the batch is always the same. SAELens under autocast computes in bfloat16, everything else in float32.
"""

import importlib
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes import batchtopk_sae, jumprelu_sae, standard_sae, topk_sae
from sae_lens.training.sae_trainer import SAETrainer
from torch.nn.functional import normalize

from saeutils import saes
from saeutils.lm.models import default_device
from saeutils.saes import alignsae, gba, initializers
from saeutils.training.checks import Options
from saeutils.training.loop import _Trainer

BATCH = 4096
SIZES = {"576 → 9,216, k 32": (576, 9216, 32), "768 → 12,288, k 64": (768, 12_288, 64), "2,048 → 16,384, k 64": (2048, 16_384, 64)}  # fmt: skip
WHO = {
    "TopK": ("SAELens", "SAELens autocast", "SAELens sparse", "dictionary_learning", "sparsify"),
    "TopK with 5% dead": ("SAELens",),
    "BatchTopK": ("SAELens", "SAELens autocast", "dictionary_learning"),
    "JumpReLU": ("SAELens", "SAELens autocast", "dictionary_learning"),
    "ReLU+L1": ("SAELens", "SAELens autocast", "dictionary_learning"),
    "GBA": (), "AlignSAE": (),
}  # fmt: skip
TF32 = (False, True) if torch.cuda.is_available() else (False,)  # on a GPU: off for parity, on for speed
CASES = [(size, kind, who) for size in SIZES for kind in WHO for who in ("ours", *WHO[kind])]


def rows(d: int) -> torch.Tensor:
    """[batch, d] of norm 1."""
    x = torch.randn(BATCH, d, generator=torch.Generator().manual_seed(0))
    return normalize(x, dim=1).to(default_device())


def stepper(trainer, x: torch.Tensor, dead: bool = False):
    def step() -> None:
        if dead:  # again before every step: some would fire in the last
            trainer.n_forward_passes_since_fired[::20] = trainer.cfg.dead_feature_window + 1
        trainer.step(x)
        trainer.n_training_steps += 1

    return step


def saelens_config(autocast: bool = False) -> SAETrainerConfig:
    return SAETrainerConfig(
        total_training_samples=BATCH * 1000,
        train_batch_size_samples=BATCH,
        lr=1e-5,
        lr_end=1e-5,
        device=default_device(),
        autocast=autocast,
    )


def sparse_relu(sae, x: torch.Tensor, k: int):
    """Biases at which every latent fires on k/n of the rows."""
    counts = torch.full((sae.cfg.d_sae,), round(k / sae.cfg.d_sae * BATCH), device=x.device)
    sae.b_enc.data.copy_(-initializers.firing_levels(x, sae.W_enc, counts))
    return sae


def ours(kind: str, d: int, n: int, k: int):
    x, common = rows(d), dict(d_in=d, d_sae=n, device=default_device())
    if kind.startswith("TopK"):
        sae = saes.SparseTopKTrainingSAE(saes.SparseTopKTrainingSAEConfig(**common, k=k))
    elif kind == "BatchTopK":
        sae = saes.SparseBatchTopKTrainingSAE(saes.SparseBatchTopKTrainingSAEConfig(**common, k=float(k)))
    elif kind == "JumpReLU":
        sae = initializers.start_jumprelu(n, k, x, partial(initializers.random_decoder, seed=0))
    elif kind == "ReLU+L1":
        cfg = saes.SparseStandardTrainingSAEConfig(**common, l1_coefficient=0.1)
        sae = sparse_relu(saes.SparseStandardTrainingSAE(cfg), x, k)
    elif kind == "GBA":
        shape = gba.geometric(1.0, 0.01, 16)
        frequencies = [k / n * v * len(shape) / sum(shape) for v in shape]  # their mean is k/n
        sae = gba.GBATrainingSAE(gba.GBATrainingSAEConfig(**common, frequencies=frequencies))
        sae.calibrate(x)
    else:
        cfg = alignsae.AlignTrainingSAEConfig(**common, slots=list("abcdef"), answers=10)
        sae = sparse_relu(alignsae.AlignTrainingSAE(cfg), x, k)
        sae.labels = torch.arange(BATCH) % 6, torch.zeros(BATCH, dtype=torch.long)
    return stepper(_Trainer("", saelens_config(), sae, Options(), None), x, "dead" in kind)


def saelens(kind: str, d: int, n: int, k: int, autocast: bool = False, **options):
    x, common = rows(d), dict(d_in=d, d_sae=n, device=default_device())
    module, cls, settings = {
        "TopK": (topk_sae, "TopK", dict(k=k)),
        "BatchTopK": (batchtopk_sae, "BatchTopK", dict(k=float(k))),
        "JumpReLU": (jumprelu_sae, "JumpReLU", {}),
        "ReLU+L1": (standard_sae, "Standard", dict(l1_coefficient=0.1)),
    }[kind.split()[0]]
    sae = getattr(module, f"{cls}TrainingSAE")(
        getattr(module, f"{cls}TrainingSAEConfig")(**common, **settings, **options)
    )
    if kind == "JumpReLU":
        initializers.calibrate(sae, x, k)
    if kind == "ReLU+L1":
        sparse_relu(sae, x, k)
    return stepper(SAETrainer(saelens_config(autocast), sae, iter([])), x, "dead" in kind)


def dictionary_learning(kind: str, d: int, n: int, k: int):
    module, cls, settings = {
        "TopK": ("top_k", "TopKTrainer", dict(k=k)),
        "BatchTopK": ("batch_top_k", "BatchTopKTrainer", dict(k=k)),
        "JumpReLU": ("jumprelu", "JumpReluTrainer", dict(target_l0=k)),
        "ReLU+L1": ("standard", "StandardTrainer", {}),
    }[kind]
    trainer_class = getattr(importlib.import_module(f"dictionary_learning.trainers.{module}"), cls)
    trainer = trainer_class(
        steps=10_000, activation_dim=d, dict_size=n, layer=0, lm_name="", device=default_device(), **settings
    )
    x, at = rows(d), iter(range(1, 10_000))  # step 0 computes a median
    return lambda: trainer.update(next(at), x)


def sparsify(kind: str, d: int, n: int, k: int):
    """Their SparseCoder, driven as their trainer does (no clipping), with Adam in place of its 8-bit Adam."""
    package = importlib.import_module("sparsify")
    sae = package.SparseCoder(d, package.SparseCoderConfig(num_latents=n, k=k), device=default_device())
    optimizer, x = torch.optim.Adam(sae.parameters(), lr=1e-5, fused=True), rows(d)
    since_fired = torch.zeros(n, dtype=torch.long, device=default_device())

    def step() -> None:
        out = sae(x, dead_mask=since_fired > 10_000_000)
        (out.fvu + out.auxk_loss / 32).backward()
        fired = torch.zeros(n, dtype=torch.bool, device=default_device())
        fired[out.latent_indices.flatten()] = True
        since_fired.add_(BATCH)[fired] = 0
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        sae.set_decoder_norm_to_unit_norm()

    return step


MAKE = {
    "ours": ours, "SAELens": saelens, "dictionary_learning": dictionary_learning, "sparsify": sparsify,
    "SAELens autocast": partial(saelens, autocast=True),
    "SAELens sparse": partial(saelens, use_sparse_activations=True, rescale_acts_by_decoder_norm=False),
}  # fmt: skip


@pytest.fixture(params=TF32)
def suffix(request) -> Iterator[str]:
    torch.backends.cuda.matmul.allow_tf32 = request.param
    yield ", TF32" if request.param else ""
    torch.backends.cuda.matmul.allow_tf32 = False


def one_matmul(d: int, n: int):
    """The floor: the encoder's product, in float32, into memory that is there."""
    x, W = rows(d), torch.randn(d, n, device=default_device())
    out = x @ W
    return lambda: torch.mm(x, W, out=out)


@pytest.mark.parametrize("size, kind, who", CASES)
def test_step(measure, request, suffix, size, kind, who):
    if who in ("dictionary_learning", "sparsify"):
        request.getfixturevalue("peers")
    torch.manual_seed(0)
    step, floor = MAKE[who](kind, *SIZES[size]), one_matmul(*SIZES[size][:2])
    measure("step", f"{kind}, {size}{suffix}", who, step, floor=floor)
