"""Every argument of every public function, tried with nothing, a wrong type, NaN, less than nothing, zero, emptiness and too much.

Public is what the rooms hand on, found by walking them: a new function fails here until it has its row. A row says how the function
is called rightly, and of each argument what kind it is; a kind says which values are refused (by one sentence that names the
argument) and which other forms of a right value are accepted.
"""

import importlib
import inspect
import shutil
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset

from saeutils.analysis.matching import compare
from saeutils.kernels.door import door
from saeutils.lm import activations, models
from saeutils.saes import (
    AlignTrainingSAE,
    AlignTrainingSAEConfig,
    SparseJumpReLUTrainingSAE,
    SparseJumpReLUTrainingSAEConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
)

ROOMS = ["kernels", "lm", "saes", "training", "steering", "analysis", "worlds", "notebook", "notebook.widgets"]
HOOK, NAN = "blocks.1.hook_resid_post", float("nan")
ROWS = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
LABELS = np.arange(300) % 2
HALF = np.arange(300) < 150


@cache
def folder():
    return tiny.saved("gpt2")


@cache
def lm():
    return models.load_lm(folder(), dtype=torch.float32)


@cache
def acts():
    return activations.collect(folder(), HOOK, text(), context=32, dtype=torch.float32)


def topk():
    return SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(d_in=32, d_sae=64, k=4))


def jumprelu():
    return SparseJumpReLUTrainingSAE(SparseJumpReLUTrainingSAEConfig(d_in=32, d_sae=64, target_l0=4.0, apply_b_dec_to_input=True))


def aligned():
    return AlignTrainingSAE(AlignTrainingSAEConfig(d_in=32, d_sae=64, slots=["a", "b"]))


@cache
def table():
    return importlib.import_module("saeutils.analysis").latent_table(acts(), topk(), 40)


OTHER = object()
# kind → (refused, other right forms of a right value)
KINDS = {
    "count": ([None, OTHER, "a", NAN, -1, 0, [], 1.5], [np.int64]),
    "seed": ([None, OTHER, "a", NAN, -1, [], 1.5], [np.int64]),
    "positive": ([None, OTHER, "a", NAN, -1.0, 0, [], float("inf")], [np.float64, torch.tensor]),
    "number": ([None, OTHER, "a", NAN, [], float("inf")], [np.float64, torch.tensor]),
    "not negative": ([None, OTHER, "a", NAN, -1.0, [], float("inf")], [np.float64]),
    "share or none": ([None, OTHER, "a", NAN, -1.0, [], 1.0], [np.float64]),
    "share": ([None, OTHER, "a", NAN, -1, 0, 1.5, []], [np.float64]),
    "matrix": ([None, OTHER, "a", NAN, 0, [], torch.zeros(0, 32), torch.ones(32), torch.full((3, 32), NAN)], []),
    "array": ([None, OTHER, "a", NAN, 0, [], np.zeros((0, 32)), np.ones(32), np.full((300, 32), NAN)], []),
    "direction": ([None, OTHER, "a", NAN, 0, [], torch.full((32,), NAN)], []),
    "texts": ([None, OTHER, "a", NAN, 0, [], [3]], [tuple]),
    "text": ([None, OTHER, NAN, 0, "", " ", []], []),
    "sae": ([None, OTHER, "a", NAN, 0, []], []),
    "saes": ([None, OTHER, NAN, 0, [], [3]], []),
    "lm": ([None, OTHER, "a", NAN, 0, []], []),
    "function": ([None, OTHER, "a", NAN, 0, []], []),
    "latent": ([None, OTHER, "a", NAN, -1, [], 64, 1.5], [np.int64, lambda v: [v], torch.tensor]),
    "positions": ([OTHER, "a", NAN, [], 1.5, slice(None, None, -1)], [lambda _: None, lambda _: 2, lambda _: np.array([1])]),
    "share or all": ([None, OTHER, "a", NAN, -1, 0, 1.5, []], [np.float64, lambda _: 1]),
    "path": ([None, OTHER, NAN, -1, 0, "", []], [lambda v: str(v)]),
    "number of rows": ([OTHER, "a", NAN, -1, [], 1.5], [lambda _: None, np.int64]),
    "count if any": ([OTHER, "a", NAN, -1, 0, [], 1.5], [lambda _: None, np.int64]),
    "bound": ([None, OTHER, "a", NAN, []], [np.float64]),
    "mapping": ([None, OTHER, "a", NAN, 0, {}, []], []),
    "dataset": ([None, OTHER, "a", NAN, 0, [], ["a"], {"train": 1}], []),
    "many": ([None, OTHER, "a", NAN, -1.0, 0, []], []),
    "choice": ([None, OTHER, "a", NAN, 0, []], []),
    "frame": ([None, OTHER, "a", NAN, 0, []], []),
    "flag": ([], []),  # true or false: Python's own rule
}
# what is refused by a rule of its own is tried where that rule is tested
ELSEWHERE = "tests of its own"


def row(make, how=lambda function, given: function(**given), **kinds):
    """What it is called with, of each argument its kind, and how it is called."""
    return make, kinds, how


def entered(function, given):
    with function(**given):
        pass


def first(function, given):
    return next(function(**given))


def collected(function, given):
    return function(**{k: v for k, v in given.items() if k != "load"})


@cache
def text():
    return Dataset.from_dict({"text": [f"the quick brown fox {i}" for i in range(40)]})


@cache
def kept():
    here = Path(tempfile.mkdtemp())
    shutil.copytree(folder(), here / "step-0")
    return str(here)


TABLE = {
    "saes.calibrate": row(lambda: dict(sae=jumprelu(), x=ROWS, l0=4.0), sae="sae", x="matrix", l0="positive"),
    "saes.data_points": row(lambda: dict(sae=topk(), x=ROWS, seed=1), sae="sae", x="matrix", seed="seed"),
    "saes.decoder_bias_at_median": row(lambda: dict(sae=topk(), x=ROWS), sae="sae", x="matrix"),
    "saes.extended": row(lambda: dict(sae=aligned(), names=["c"], answers=2, freeze=True, seed=1), sae="sae", names=ELSEWHERE, answers="seed", freeze="flag", seed="seed"),
    "saes.fold_scale": row(lambda: dict(sae=topk(), scale=2.0, shift=None), sae="sae", scale="positive", shift=ELSEWHERE),
    "saes.geometric": row(lambda: dict(highest=0.1, lowest=0.01, groups=3), highest="positive", lowest="positive", groups="count"),
    "saes.geometric_median": row(lambda: dict(x=ROWS, iterations=5, tolerance=1e-3), x="matrix", iterations="count", tolerance="positive"),
    "saes.k_means": row(lambda: dict(sae=topk(), x=ROWS, seed=1), sae="sae", x="matrix", seed="seed"),
    "saes.mirror_decoder": row(lambda: dict(sae=mirrored(), lm=lm(), layer=1), sae="sae", lm="lm", layer="seed"),
    "saes.mlp_directions": row(lambda: dict(lm=lm(), layer=1), lm="lm", layer="seed"),
    "saes.random_decoder": row(lambda: dict(sae=topk(), seed=1), sae="sae", seed="seed"),
    "saes.residual_mirror_decoder": row(
        lambda: dict(sae=topk(), lm=lm(), layer=1, x=ROWS, seed=1, share=0.5), sae="sae", lm="lm", layer="seed", x="matrix", seed="seed", share="share"),
    "saes.slot": row(lambda: dict(sae=aligned(), name="a"), sae="sae", name="text"),
    "saes.start_jumprelu": row(lambda: dict(d_sae=64, l0=4.0, x=ROWS, decoder=lambda sae: None), d_sae="count", l0="positive", x="matrix", decoder="function", settings=ELSEWHERE),
    "saes.swap": row(lambda: dict(sae=topk(), h=ROWS[:1], source=torch.tensor([0]), target=torch.tensor([1]), value=torch.ones(1)),
                     sae="sae", h="matrix", source=ELSEWHERE, target=ELSEWHERE, value=ELSEWHERE),
    "saes.tie": row(lambda: dict(sae=topk()), sae="sae"),
    "training.wake": row(lambda: dict(sae=aligned(), x=ROWS, relation=torch.zeros(300), share=0.1), sae="sae", x="matrix", relation=ELSEWHERE, share="share"),
    "training.labelled": row(lambda: dict(saes=[aligned()], x=ROWS, relation=torch.zeros(300).long(), answer=torch.zeros(300).long(), batch=10, seed=1),
                             saes=ELSEWHERE, x="matrix", relation=ELSEWHERE, answer=ELSEWHERE, batch="count", seed="seed"),
    "steering.ablate": row(lambda: dict(hook=HOOK, sae=topk(), latent=3, positions=[1]), hook="text", sae="sae", latent="latent", positions="positions"),
    "steering.add": row(lambda: dict(hook=HOOK, direction=ROWS[0], strength=2.0, positions=[1]), hook="text", direction="direction", strength="number", positions="positions"),
    "steering.clamp": row(lambda: dict(hook=HOOK, sae=topk(), latent=3, value=2.0, positions=[1]), hook="text", sae="sae", latent="latent", value="number", positions="positions"),
    "steering.continuation_loss": row(lambda: dict(lm=lm(), prompts=["a"], texts=[["b"]], batch_size=2), lm="lm", prompts="texts", texts=ELSEWHERE, batch_size="count"),
    "steering.continued": row(lambda: dict(lm=lm(), ids=torch.tensor([[1, 2]]), tokens=2, temperature=0.5, generator=None),
                              lm="lm", ids=ELSEWHERE, tokens="count", temperature="not negative", generator=ELSEWHERE),
    "steering.generate": row(lambda: dict(lm=lm(), prompts=["a"], edits=(), tokens=2, temperature=0.5, samples=1, seed=1, batch_size=2),
                             lm="lm", prompts="texts", edits=ELSEWHERE, tokens="count", temperature="not negative", samples="count", seed="seed", batch_size="count"),
    "steering.latents": row(lambda: dict(hook=HOOK, sae=topk(), change=lambda f: f, positions=[1]), hook="text", sae="sae", change="function", positions="positions"),
    "steering.loss_recovered": row(lambda: dict(lm=lm(), sae=topk(), hook=HOOK, texts=["the fox jumps"], context=8, batch_size=2, known=None),
                                   lm="lm", sae="sae", hook="text", texts="texts", context="count", batch_size="count", known=ELSEWHERE),
    "steering.mean_loss": row(lambda: dict(lm=lm(), rows=[[1, 2, 3]], edits=(), batch_size=2), lm="lm", rows=ELSEWHERE, edits=ELSEWHERE, batch_size="count", each=ELSEWHERE),
    "steering.project_out": row(lambda: dict(hook=HOOK, directions=ROWS[:2], positions=[1]), hook="text", directions="direction", positions="positions"),
    "steering.scale": row(lambda: dict(hook=HOOK, sae=topk(), latent=3, factor=2.0, positions=[1]), hook="text", sae="sae", latent="latent", factor="number", positions="positions"),
    "steering.splice": row(lambda: dict(hook=HOOK, sae=topk()), hook="text", sae="sae"),
    "steering.windows": row(lambda: dict(lm=lm(), texts=["the fox"], context=8), lm="lm", texts="texts", context="count"),
    "analysis.absorption": row(lambda: dict(x=ROWS, letter=LABELS, sae=topk(), train=HALF, probes={}, max_k=3, jump=0.1),
                               x="matrix", letter=ELSEWHERE, sae="sae", train=ELSEWHERE, probes=ELSEWHERE, max_k="count", jump="number"),
    "analysis.accuracy": row(lambda: dict(probe=(np.ones(32), 0.0), x=ROWS.numpy(), y=LABELS), probe=ELSEWHERE, x=ELSEWHERE, y=ELSEWHERE),
    "analysis.compare": row(lambda: dict(a=topk(), b=topk()), a="sae", b="sae"),
    "analysis.detection": row(lambda: dict(f=torch.rand(30, 2), texts=["a"] * 30, embedded=np.ones((30, 2)), latents=[0], seed=1),
                              f=ELSEWHERE, texts="texts", embedded=ELSEWHERE, latents=ELSEWHERE, seed="seed"),
    "analysis.most_different": row(lambda: dict(z=ROWS.numpy(), y=LABELS, rows=HALF, k=3), z="array", y=ELSEWHERE, rows=ELSEWHERE, k="count"),
    "analysis.k_sparse_probing": row(lambda: dict(z=ROWS.numpy(), y=LABELS, train=HALF, k=3), z="array", y=ELSEWHERE, train=ELSEWHERE, k="count"),
    "analysis.latent_table": row(lambda: dict(acts=acts(), sae=topk(), n_docs=40, l2=False), acts="sae", sae="sae", n_docs="count", l2="flag"),
    "analysis.letter_probes": row(lambda: dict(x=ROWS.numpy(), letter=LABELS, train=HALF, min_f1=0.5), x="array", letter=ELSEWHERE, train=ELSEWHERE, min_f1="share"),
    "analysis.linear_probe": row(lambda: dict(x=ROWS.numpy(), y=LABELS), x="array", y=ELSEWHERE),
    "analysis.match": row(lambda: dict(A=ROWS, B=ROWS, dense_below=8), A="matrix", B="matrix", dense_below="seed"),
    "analysis.match_certified": row(lambda: dict(A=ROWS, B=ROWS, neighbours=4, rounds=1, progress=False), A="matrix", B="matrix", neighbours="count", rounds="count", progress="flag"),
    "analysis.minilm": row(lambda: dict(texts=["a"], batch_size=2), texts="texts", batch_size="count"),
    "analysis.pooled": row(lambda: dict(rows={"x": ROWS, "doc": torch.arange(300)}, n_docs=300, encode=None), rows=ELSEWHERE, n_docs="count", encode=ELSEWHERE),
    "analysis.promoted": row(lambda: dict(lm=lm(), direction=ROWS[0]), lm="lm", direction="direction"),
    "analysis.promoting": row(lambda: dict(lm=lm(), sae=topk(), token=3), lm="lm", sae="sae", token="seed"),
    "analysis.pw_mcc": row(lambda: dict(saes=[topk(), topk()]), saes="saes"),
    "analysis.scr": row(lambda: dict(x=ROWS.numpy(), z=ROWS.numpy(), W_dec=np.eye(32), wanted=LABELS, spurious=(np.arange(300) // 2) % 2, train=HALF, n=3),
                        x="array", z="array", W_dec="array", wanted=ELSEWHERE, spurious=ELSEWHERE, train=ELSEWHERE, n="count"),
    "analysis.shaded": row(lambda: dict(table=table(), tokenizer=lm().tokenizer, latent=3, docs=None, n=3, around=None),
                           table="sae", tokenizer="sae", latent=ELSEWHERE, docs=ELSEWHERE, n="count", around=ELSEWHERE),
    "analysis.token_table": row(lambda: dict(lm=lm(), direction=ROWS[0], n=3), lm="lm", direction="direction", n="count"),
    "analysis.top_latents": row(lambda: dict(lm=lm(), sae=topk(), hook=HOOK, prompt="the fox", n=3), lm="lm", sae="sae", hook="text", prompt="text", n="count"),
    "analysis.tpp": row(lambda: dict(x=ROWS.numpy(), z=ROWS.numpy(), W_dec=np.eye(32), y=LABELS, train=HALF, n=3), x="array", z="array", W_dec="array", y=ELSEWHERE, train=ELSEWHERE, n="count"),
    "analysis.unlearning": row(
        lambda: dict(lm=lm(), sae=topk(), hook=HOOK, forget=(ROWS, [[1, 2, 3]], 1.0), retain=(ROWS, [[1, 2, 3]], 1.0), unit=1.0, settings=[(2, 0.1)], rate=0.1, damage=0.1),
        lm="lm", sae="sae", hook="text", forget=ELSEWHERE, retain=ELSEWHERE, unit="positive", settings=ELSEWHERE, rate="share", damage="not negative"),
    "worlds.documents": row(lambda: dict(names=["tatoeba"], tokenizer=tiny.tokenizer(), n=2, docs=2, skip=1), names="texts", tokenizer=ELSEWHERE, n="count", docs="count", skip="seed"),
    "worlds.first_tokens": row(lambda: dict(texts=["a b"], tokenizer=tiny.tokenizer(), n=1), texts=ELSEWHERE, tokenizer=ELSEWHERE, n="count"),
    "worlds.population": row(lambda: dict(n=4, relations_=None, seed=1), n="count", relations_=ELSEWHERE, seed="seed"),
    "worlds.questions": row(lambda: dict(people=importlib.import_module("saeutils.worlds").population(4), unseen=0.2, seed=1, taught=(0, 1)), people=ELSEWHERE, unseen="share or none", seed="seed", taught=ELSEWHERE),
    "worlds.split_pairs": row(lambda: dict(pairs=Dataset.from_dict({"ja": list("abcdefgh"), "en": list("ijklmnop")}), held_out=1, seed=1), pairs=ELSEWHERE, held_out="count", seed="seed"),
    "training.finished": row(lambda: dict(run="door", jobs={"a": {}}, work=lambda folder: 1, version=1), run="text", jobs="mapping", work="function", version="count"),
    "training.sweep": row(lambda: dict(run="door", jobs={"a": {}}, work=lambda folder: 1, workers=1, ray=None, version=1, progress=False),
                          run="text", jobs="mapping", work="function", workers="count if any", ray=ELSEWHERE, version="count", progress="flag"),
    "lm.Activations": row(lambda: dict(folder=acts().folder, fractions=(0.8, 0.1, 0.1)), folder="path", fractions="many"),
    "lm.checkpoints": row(lambda: dict(source=kept(), wanted=[0]), source="path", wanted=ELSEWHERE),
    "lm.collect": row(lambda: dict(lm=folder(), hook=HOOK, text=text(), n_tokens=100, context=32, outlier=10.0, seed=0, batch_tokens=64, workers=1, load={}), collected,
                      lm="path", hook="text", text="dataset", n_tokens="count if any", context="count", outlier="positive", seed="seed", batch_tokens="count", workers="count", load=ELSEWHERE),
    "lm.load_hf": row(lambda: dict(name=folder(), layers=1, dtype=None, device=None, revision=None), name="path", layers="count if any", dtype=ELSEWHERE, device=ELSEWHERE, revision=ELSEWHERE),
    "lm.load_lm": row(lambda: dict(name=folder(), layers=1, dtype=None, device=None, revision=None), name="path", layers="count if any", dtype=ELSEWHERE, device=ELSEWHERE, revision=ELSEWHERE),
    "lm.load_text": row(lambda: dict(name="tatoeba", max_docs=3), name="choice", max_docs="count if any"),
    "lm.stream": row(lambda: dict(lm=folder(), hook=HOOK, text=text(), batch_size=8, context=32, outlier=10.0, normalise="l2", centre=False, seed=0, buffer=1, start=0, steps=4, load={}), collected,
                     lm="path", hook="text", text="dataset", batch_size="count", context="count", outlier="positive", normalise="choice", centre="flag", seed="seed", buffer="count", start="seed", steps="count if any", load=ELSEWHERE),
    "saes.AlignTrainingSAEConfig": row(lambda: dict(d_in=8, d_sae=16, slots=["a", "b"], answers=2, bind=1.0, decorrelate=1.0, value=1.0, free_k=4), slots="texts", answers="seed",
                                       bind="not negative", decorrelate="not negative", value="not negative", free_k="count if any"),
    "saes.GBATrainingSAEConfig": row(lambda: dict(d_in=8, d_sae=16, frequencies=[0.1, 0.01], every=5, down=0.1, up=0.1, silent=0.1), frequencies="many", every="count",
                                     down="not negative", up="not negative", silent="not negative"),
    "saes.SparseBatchTopKTrainingSAEConfig": row(lambda: dict(d_in=8, d_sae=16, k=4), k="positive"),
    "saes.SparseJumpReLUTrainingSAEConfig": row(lambda: dict(d_in=8, d_sae=16, target_l0=4.0), target_l0="positive"),
    "saes.SparseTopKTrainingSAEConfig": row(lambda: dict(d_in=8, d_sae=16, k=4), k="count"),
    "training.fit": row(lambda: dict(saes={"one": aligned()}, x=ROWS, relation=torch.zeros(300).long(), answer=torch.zeros(300).long(), stages=(1, 1), batch=10, lr=1e-3, seed=1, checkpoint=None),
                        saes="mapping", x="matrix", relation=ELSEWHERE, answer=ELSEWHERE, stages="many", batch="count", lr="positive", seed="seed", checkpoint=ELSEWHERE, settings=ELSEWHERE),
    "training.train": row(
        lambda: dict(sae=topk(), batches=[ROWS] * 3, steps=2, lr=1e-3, betas=(0.9, 0.999), warm_up=1, decay=1, unit_norm=True, median_rows=10, dead="none", dead_window=5, dead_every=5, dead_until=0.5,
                     dead_threshold=1e-5, aux_k=0.1, log_every=1, checkpoint=None, checkpoint_every=5, callback=None, progress=False, seed=0, orders=None),
        sae="sae", batches="many", steps="count", lr="positive", betas="many", warm_up="number of rows", decay="number of rows", unit_norm="flag", median_rows="seed", dead="choice", dead_window="count",
        dead_every="count", dead_until="share or all", dead_threshold="share", aux_k="not negative", log_every="count", checkpoint=ELSEWHERE, checkpoint_every="count", callback=ELSEWHERE, progress="flag",
        seed="seed", orders=ELSEWHERE),
    "steering.edited": row(lambda: dict(lm=lm(), edits=[]), entered, lm="lm", edits=ELSEWHERE),
    "steering.stepwise": row(lambda: dict(lm=lm(), ids=torch.tensor([[1, 2]]), temperature=0.5, generator=None), first, lm="lm", ids="many", temperature="not negative", generator=ELSEWHERE),
    "analysis.stability": row(lambda: dict(matched=compare(topk(), topk())), matched="frame"),
    "worlds.answers": row(lambda: dict(lm=lm(), prompts=["Q: who?\nA:"], hook=HOOK, delta=None, tokens=2, batch_size=2), lm="lm", prompts="texts", hook=ELSEWHERE, delta=ELSEWHERE, tokens="count", batch_size="count"),
    "worlds.last_states": row(lambda: dict(lm=lm(), prompts=["Q: who?\nA:"], hooks=[HOOK], batch_size=2), lm="lm", prompts="texts", hooks=ELSEWHERE, batch_size="count"),
    "worlds.train_lm": row(
        lambda: dict(folder=Path(tempfile.mkdtemp()), texts=["the fox jumps over it"] * 20, tokenizer=tiny.tokenizer(), width=16, layers=1, heads=2, context=8, batch=2, steps=[1], lr=1e-3, seed=0, device=None),
        folder="path", texts="texts", tokenizer="sae", width="count", layers="count", heads="count", context="count", batch="count", steps="many", lr="positive", seed="seed", device=ELSEWHERE),
    "notebook.Ledger": row(lambda: dict(notebook="door", scale="smoke"), notebook="text", scale="choice"),
    "notebook.at_least": row(lambda: dict(bar=0.5), bar="number"),
    "notebook.at_most": row(lambda: dict(bar=0.5), bar="number"),
    "notebook.between": row(lambda: dict(low=-0.5, high=0.5), low="bound", high="bound"),
    "notebook.choose": row(lambda: dict(scale="smoke", table={"smoke": dict(a=1)}), scale="choice", table="mapping"),
    "notebook.seed": row(lambda: dict(i=1), i="seed"),
    "notebook.widgets.retrain_panel": row(lambda: dict(x=ROWS, heldout=ROWS[:50], l1=2.0, gain=0.1), x="matrix", heldout="matrix", l1="positive", gain="positive"),
}  # fmt: skip
# what stands apart takes nothing, files or texts of a run, or is made by a configuration: errors are tested where it lives
APART = {
    "kernels.cache_dir", "kernels.sha256_of", "kernels.whole", "analysis.granularity", "analysis.language_of", "analysis.language_tendency", "analysis.signals", "kernels.caps", "kernels.data_dir", "kernels.key", "lm.default_device", "lm.labelled_tasks", "lm.located", "saes.AlignSAE", "saes.AlignSAEConfig", "saes.AlignTrainingSAE",
    "saes.GBATrainingSAE", "saes.SparseBatchTopKTrainingSAE", "saes.SparseJumpReLUTrainingSAE", "saes.SparseStandardTrainingSAE", "saes.SparseStandardTrainingSAEConfig", "saes.SparseTopKTrainingSAE",
    "training.resample_anthropic", "training.resample_post", "steering.only", "analysis.Facts", "analysis.LatentTable", "analysis.disentanglement", "worlds.memorise", "worlds.relations",
    "notebook.widgets.label_panel", "notebook.widgets.family_panel", "notebook.widgets.pairs_panel", "notebook.widgets.swap_panel",
    "notebook.widgets.Task", "notebook.widgets.probe_panel", "notebook.widgets.word_panel",
    "notebook.widgets.Recovery", "notebook.widgets.recovery_panel",
}  # fmt: skip


def mirrored():
    width = 2 * lm().blocks[1].mlp.W_out.shape[0]
    return SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(d_in=32, d_sae=width, k=4))


def _public() -> set[str]:
    found = set()
    for room in ROOMS:
        module = importlib.import_module(f"saeutils.{room}")
        found |= {f"{room}.{n}" for n in module.__all__ if callable(getattr(module, n))}
    return found


def _function(name: str):
    room, _, own = name.rpartition(".")
    return getattr(importlib.import_module(f"saeutils.{room}"), own)


def test_every_public_function_has_its_row():
    assert _public() == TABLE.keys() | APART and not TABLE.keys() & APART
    for name, (_, kinds, _) in TABLE.items():
        own = set(inspect.signature(_function(name)).parameters)
        assert set(kinds) == own or (name.endswith("Config") and set(kinds) < own), f"{name}: a kind for each argument"


@pytest.mark.parametrize("name", TABLE)
def test_bad_arguments_are_refused_by_name(name):
    make, kinds, how = TABLE[name]
    how(_function(name), make())
    wrong = []
    for arg, kind in kinds.items():
        for value in KINDS[kind][0] if kind != ELSEWHERE else ():
            try:
                how(_function(name), make() | {arg: value})
                wrong.append(f"{arg}={value!r} was accepted")
            except ValueError as error:
                if arg not in str(error):
                    wrong.append(f"{arg}={value!r}: {error}")
            except Exception as error:
                wrong.append(f"{arg}={value!r}: {type(error).__name__} {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", TABLE)
def test_natural_forms_are_accepted(name):
    make, kinds, how = TABLE[name]
    for arg, kind in kinds.items():
        for form in KINDS[kind][1] if kind != ELSEWHERE else ():
            given = make()
            how(_function(name), given | {arg: form(given[arg])})


def test_a_rule_says_what_came_and_what_is_expected():
    with pytest.raises(ValueError, match=r"steps=0: expected a whole number of at least 1"):
        door(steps=0)
    with pytest.raises(ValueError, match=r"x=Tensor \(3, 2\) with NaN or inf: expected a matrix"):
        door(x=torch.full((3, 2), NAN))
