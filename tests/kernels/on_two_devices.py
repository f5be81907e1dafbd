"""Run by ``test_devices.py``: SAE and LM on different devices meet, and runs go on where they were not begun."""

import pretended  # before torch  # isort: skip

import contextlib
import os
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ |= {"SAEUTILS_CACHE": tempfile.mkdtemp(), "TQDM_DISABLE": "1"}

import tiny
import torch
from datasets import Dataset

from saeutils import metrics, steering
from saeutils.analysis import features, index, interventions, matching
from saeutils.lm import activations, models, pretraining
from saeutils.saes import (
    AlignTrainingSAE,
    AlignTrainingSAEConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
    alignsae,
    initializers,
)
from saeutils.training import train
from saeutils.worlds import bilingual

HOOK, TEXTS = "blocks.1.hook_resid_post", ["the quick brown fox jumps", "over the lazy dog it goes", "and comes back home again"]
FOLDER = tiny.saved("llama")
LM = {device: models.load_lm(FOLDER, dtype=torch.float32, device=device) for device in ("cpu", "cuda")}
ROWS = torch.randn(600, 32, generator=torch.Generator().manual_seed(0))


def topk(device: str = "cpu") -> SparseTopKTrainingSAE:
    torch.manual_seed(0)
    return SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(d_in=32, d_sae=64, k=4)).to(device)


def edits(lm: str, sae: str) -> None:
    x = topk(sae)
    made = [steering.clamp(HOOK, x, 3, 2.0), steering.scale(HOOK, x, [1, 2], 2.0), steering.ablate(HOOK, x, 5), steering.splice(HOOK, x)]
    made += [steering.add(HOOK, x.W_dec[3], 2.0), steering.project_out(HOOK, x.W_dec[:3].detach())]
    texts = [steering.generate(LM[lm], ["the fox", "a dog"], [edit], tokens=5, temperature=t) for edit in made for t in (0.0, 0.7)]
    if lm == "cuda":
        greedy = [steering.generate(LM["cpu"], ["the fox", "a dog"], [e], tokens=5) for e in made[:1]]
        assert greedy[0] == texts[0]


def losses(lm: str, sae: str) -> None:
    found = steering.loss_recovered(LM[lm], topk(sae), HOOK, TEXTS)
    expected = steering.loss_recovered(LM["cpu"], topk(), HOOK, TEXTS)
    assert abs(found["sae"] - expected["sae"]) < 1e-4 * expected["sae"]
    steering.continuation_loss(LM[lm], ["the"], [["fox"]])


def readings(lm: str, sae: str) -> None:
    x = topk(sae)
    features.top_latents(LM[lm], x, HOOK, "the quick brown fox")
    features.promoted(LM[lm], x.W_dec[3].detach())
    features.promoting(LM[lm], x, 7)
    index.indexed(LM[lm], x, HOOK, TEXTS)
    metrics.evaluate(x, ROWS.to(lm))
    assert abs(metrics.evaluate(x, ROWS.to(lm))["fvu"] - metrics.evaluate(topk(), ROWS)["fvu"]) < 1e-4
    initializers.mlp_directions(LM[lm], 1)


def unlearning(lm: str, sae: str) -> None:
    windows = steering.windows(LM[lm], TEXTS)
    part = (ROWS.to(lm), windows, steering.mean_loss(LM[lm], windows))
    interventions.unlearning(LM[lm], topk(sae), HOOK, part, part, unit=1.0)


def swapped(lm: str, sae: str) -> None:
    x = AlignTrainingSAE(AlignTrainingSAEConfig(d_in=32, d_sae=64, slots=["a", "b"])).to(sae)
    one = torch.tensor([0, 1])
    assert alignsae.swap(x, ROWS[:2].to(lm), one, 1 - one, torch.ones(2)).device.type == lm


def checkpoint(begun: str, resumed: str) -> None:
    """Half of a run on one device, the other half on the other: as if on one, but for rounding."""
    folder = Path(tempfile.mkdtemp())
    for dead in ("none", "anthropic"):
        options = dict(lr=1e-3, progress=False, checkpoint_every=5, dead=dead, dead_every=4, dead_threshold=0.01, log_every=5)

        def batches(start=0, device="cpu"):
            return (rows.to(device) for rows in ROWS.split(60)[start:])

        def stop(step, *_):
            if step == 5:
                raise KeyboardInterrupt

        whole = topk()
        train(whole, batches, 10, **options)
        with contextlib.suppress(KeyboardInterrupt):
            train(topk(begun), partial(batches, device=begun), 10, checkpoint=folder / dead, callback=stop, **options)
        other = topk(resumed)
        train(other, partial(batches, device=resumed), 10, checkpoint=folder / dead, **options)
        assert torch.allclose(other.W_dec.cpu(), whole.W_dec, atol=1e-3), dead


def language_model(begun: str, resumed: str) -> None:
    """An LM's run, begun without a gradient scaler, goes on with one (a T4), and the other way round."""
    _, words = models.load_hf(FOLDER, layers=1, device="cpu")
    folder, shape = Path(tempfile.mkdtemp()), dict(width=32, layers=1, heads=2, context=8, batch=4, lr=1e-3)
    keep = pretraining.keep

    def stop(model, tokenizer, path):
        if path.name.endswith("6"):
            raise KeyboardInterrupt
        keep(model, tokenizer, path)

    pretraining.keep = stop
    with contextlib.suppress(KeyboardInterrupt):
        bilingual.train_lm(folder, TEXTS * 20, words, steps=[3, 6], device=begun, **shape)
    pretraining.keep = keep
    assert list(bilingual.train_lm(folder, TEXTS * 20, words, steps=[3, 6], device=resumed, **shape)) == [3, 6]


def collected(lm: str, sae: str) -> None:
    text = Dataset.from_dict({"text": TEXTS * 5})
    rows = activations.collect(FOLDER, HOOK, text, context=16, dtype=torch.float32, device=lm)
    plain = activations.collect(FOLDER, HOOK, text, context=16, dtype=torch.float32, device="cpu")
    assert torch.allclose(rows.all()["x"], plain.all()["x"], atol=1e-4)
    features.latent_table(rows, topk(sae), len(text))


def matched(lm: str, sae: str) -> None:
    partner, _ = matching.match(topk(lm).W_dec, topk(lm).W_dec.flip(0), dense_below=8)
    assert partner.tolist() == list(range(63, -1, -1))


failed = 0
for work in (edits, losses, readings, unlearning, swapped, checkpoint, language_model, collected, matched):
    for pair in (("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")):
        try:
            work(*pair)
        except Exception:
            failed += 1
            print(f"FAILED {work.__name__}{pair}")
            traceback.print_exc(file=sys.stdout)
assert pretended.CAPABILITY
sys.exit(failed)
