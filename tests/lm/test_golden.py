"""What is found again by a key is what would be made today: a producer whose results change must raise its VERSION.

Each producer runs on what lies in ``data/``; of its result stand here whole numbers as a hash, and traces (known again on another
processor, see ``kernels/traces.py``). If one fails and the change is meant: raise the VERSION that is named, and write down the new.
"""

import hashlib
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from saeutils.analysis import index
from saeutils.kernels import files, traces
from saeutils.lm import activations, corpus, models, pretraining
from saeutils.saes import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig
from saeutils.training import loop
from saeutils.worlds import bilingual

LM, HOOK = "bilingual-lm/step-0000250", "blocks.1.hook_resid_post"
TEXT = ["The girl went to school with her brother.", "犬が走っています。", "He said that it was too late."] * 4
GOLDEN = {
    ("rows", 2): ("b3881cb227f2b5c4", [472.87582, -0.25525, 1.23154, -0.27333, -0.29549, -0.48042, 0.62118, 0.89588, 0.68258]),
    ("SAE", 1): ("", [8.0, -0.07506, -1.40497, 1.77039, 0.93872, -0.5962, -0.19877, -0.49568, 3.14792]),
    ("language model", 1): ("", [1.02504, -0.26028, 0.18174, -0.58213, -1.28895, 0.06962, 0.68702, -0.278, -0.66645]),
    ("index", 1): ("b384f9306252b9e8", [142.91138, -0.02898, -0.55178, -1.25898, -0.85205, -1.41433, -1.69404, -0.51088, 0.75419]),
    ("random twin", 1): ("", [5.15603, 1.39987, -1.87274, 0.83129, 0.8511, -0.32515, -1.39088, 1.3172, -0.83067]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAEUTILS_CACHE", str(tmp_path))


def _hash(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(t.long().numpy().tobytes() for t in tensors)).hexdigest()[:16]


def _rows() -> tuple[str, list[float]]:
    rows = activations.collect(LM, HOOK, Dataset.from_dict({"text": TEXT}), context=16, dtype=torch.float32).all()
    return _hash(rows["token"], rows["doc"], rows["position"]), traces.trace(rows["x"])


def _trained() -> SparseTopKTrainingSAE:
    torch.manual_seed(0)
    sae = SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(d_in=32, d_sae=64, k=4))
    data = torch.randn(20 * 64, 32, generator=torch.Generator().manual_seed(1)).split(64)
    loop.train(sae, data, 20, lr=1e-3, progress=False)
    return sae


def _sae() -> tuple[str, list[float]]:
    return "", traces.trace(_trained().W_dec)


def _language_model() -> tuple[str, list[float]]:
    _, words = models.load_hf(LM, layers=1)
    shape = dict(width=32, layers=1, heads=2, context=8, batch=4, lr=1e-5, device="cpu")
    found = bilingual.train_lm(files.cache_dir("lm"), TEXT, words, steps=[3], **shape)
    weights = load_file(Path(found[3]["name"]) / "model.safetensors")
    return "", traces.trace(weights["model.layers.0.mlp.down_proj.weight"])


def _twin() -> tuple[str, list[float]]:
    weights = load_file(Path(models.random_twin(LM, layers=1, seed=3)) / "model.safetensors")
    return "", traces.trace(weights["model.layers.0.mlp.down_proj.weight"])


def _index() -> tuple[str, list[float]]:
    lm = models.load_lm(LM, dtype=torch.float32)
    torch.manual_seed(0)
    sae = SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(d_in=lm.cfg.d_model, d_sae=64, k=4))
    table, _ = index.indexed(lm, sae, HOOK, TEXT)
    return _hash(torch.from_numpy(table.doc), torch.from_numpy(table.token)), traces.trace(torch.from_numpy(table.acts.toarray()))


PRODUCERS = {"rows": (_rows, corpus), "SAE": (_sae, loop), "language model": (_language_model, pretraining), "index": (_index, index)}


@pytest.mark.parametrize("name", [*PRODUCERS, "random twin"])
def test_what_a_version_stands_for(name):
    make, module = PRODUCERS.get(name, (_twin, None))
    version = module.VERSION if module else models.TWIN
    whole, numbers = make()
    assert (name, version) in GOLDEN, f"write down: ({name!r}, {version}): {(whole, [round(x, 5) for x in numbers])},"
    known = GOLDEN[name, version]
    assert whole == known[0] and traces.alike(known[1], numbers), f"{name}: the result changed, raise VERSION and write down the new"


def test_a_version_is_part_of_every_key(monkeypatch):
    texts = Dataset.from_dict({"text": TEXT})
    first = corpus.key(LM, HOOK, texts, {}), models.random_twin(LM, layers=1)
    monkeypatch.setattr(corpus, "VERSION", 10**6)
    monkeypatch.setattr(models, "TWIN", 10**6)
    second = corpus.key(LM, HOOK, texts, {}), models.random_twin(LM, layers=1)
    assert not set(first) & set(second)
    sae, data = _trained(), torch.randn(5 * 64, 32).split(64)
    loop.train(sae, data, 5, progress=False, checkpoint=files.cache_dir("run"))
    monkeypatch.setattr(loop, "VERSION", 10**6)
    with pytest.raises(ValueError, match="another version"):
        loop.train(sae, data, 5, progress=False, checkpoint=files.cache_dir("run"))
