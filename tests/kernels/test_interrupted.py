"""Two processes at once, SIGKILL at ten moments, a full disk, truncated files: afterwards the same result, bit for bit."""

import errno
import hashlib
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
from datasets import Dataset

from saeutils.kernels import files
from saeutils.lm import activations, models, shards
from saeutils.saes import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig
from saeutils.training import train
from saeutils.worlds import bilingual

TEXT = [f"the quick brown fox {i} jumps over the lazy dog " * 4 for i in range(160)]


def _collected(lm: str, cache: Path) -> str:
    """Rows in shards of 1,000 tokens, as a hash."""
    os.environ |= {"SAEUTILS_CACHE": str(cache), "SAEUTILS_CAP": "shard_tokens=1000", "TQDM_DISABLE": "1"}
    rows = activations.collect(lm, "blocks.1.hook_resid_post", Dataset.from_dict({"text": TEXT}), context=64, dtype=torch.float32).all()
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in rows.values())).hexdigest()


def _trained(lm: str, cache: Path) -> str:
    """An SAE after 300 steps with a checkpoint every 10, as a hash."""
    os.environ |= {"SAEUTILS_CACHE": str(cache), "TQDM_DISABLE": "1"}
    torch.manual_seed(0)
    sae = SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(d_in=32, d_sae=128, k=8))
    data = torch.randn(300 * 64, 32, generator=torch.Generator().manual_seed(1)).split(64)
    train(sae, lambda start=0: iter(data[start:]), 300, checkpoint=cache / "run", checkpoint_every=10, progress=False)
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in sae.state_dict().values())).hexdigest()


def _pretrained(lm: str, cache: Path) -> str:
    """A language model after 60 steps, kept at six of them, as a hash of its last."""
    os.environ |= {"SAEUTILS_CACHE": str(cache), "TQDM_DISABLE": "1"}
    shape = dict(width=32, layers=2, heads=2, context=16, batch=8, lr=1e-3, device="cpu")
    found = bilingual.train_lm(cache / "lm", TEXT, tiny.tokenizer(), steps=[0, 10, 20, 30, 45, 60], **shape)
    return hashlib.sha256((Path(found[60]["name"]) / "model.safetensors").read_bytes()).hexdigest()


def _twin(lm: str, cache: Path) -> str:
    """A random twin of the model, as a hash."""
    os.environ |= {"SAEUTILS_CACHE": str(cache)}
    return hashlib.sha256((Path(models.random_twin(lm, layers=2)) / "model.safetensors").read_bytes()).hexdigest()


FAIL = {1, 4, 9, 14, 19, 30}  # of all writes, counted from 0
WORK = {"collection": _collected, "SAE": _trained, "LM": _pretrained, "random twin": _twin}


def _report(name: str, lm: str, cache: Path, out: Path) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)
    out.write_text(WORK[name](lm, cache))


@pytest.fixture(scope="module")
def start():
    """Starts work in a process of its own, forked from one that has imported everything."""
    context = tiny.forks("sae_lens", "transformers", "datasets", "saeutils.training.loop", "saeutils.lm.activations", "saeutils.worlds.bilingual")

    def begin(name: str, lm: str, cache: Path, out: Path):
        process = context.Process(target=_report, args=(name, lm, cache, out))
        process.start()
        return process

    return begin


@pytest.fixture(scope="module")
def lm():
    return tiny.saved("llama")


@pytest.fixture(scope="module")
def right(start, lm, tmp_path_factory):
    """name → what undisturbed work gives, and how long it takes."""
    known = {}

    def of(name: str) -> str:
        if name not in known:
            folder = tmp_path_factory.mktemp("right")
            began, process = time.monotonic(), start(name, lm, folder, folder / "out")
            process.join()
            of.seconds[name] = time.monotonic() - began
            assert process.exitcode == 0
            known[name] = (folder / "out").read_text()
        return known[name]

    of.seconds = {}
    return of


@pytest.mark.parametrize("name", WORK)
def test_two_processes_at_once(name, start, right, lm, tmp_path):
    both = [start(name, lm, tmp_path, tmp_path / out) for out in ("a", "b")]
    for process in both:
        process.join()
    assert [p.exitcode for p in both] == [0, 0]
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == right(name)


@pytest.mark.parametrize("name", ["collection", "SAE", "LM"])
def test_killed_at_ten_moments(name, start, right, lm, tmp_path):
    draw, expected, kills, cache = random.Random(0), right(name), 0, tmp_path / "cache"
    while kills < 10:
        cache.mkdir(exist_ok=True)
        process = start(name, lm, cache, tmp_path / "out")
        process.join(draw.uniform(0.05, 0.6) * right.seconds[name])
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        if process.exitcode == 0:  # it came to its end before: from nothing again
            assert (tmp_path / "out").read_text() == expected
            shutil.rmtree(cache)
    cache.mkdir(exist_ok=True)
    process = start(name, lm, cache, tmp_path / "out")
    process.join()
    assert process.exitcode == 0 and (tmp_path / "out").read_text() == expected
    left = [p.name for p in tmp_path.rglob(".*") if p.is_dir()]
    assert not left, "what killed processes left behind is cleared away"


@pytest.mark.parametrize("name", ["collection", "SAE", "LM", "random twin"])
def test_a_full_disk(name, right, lm, tmp_path, monkeypatch):
    """Some writes fail; work is started again after each."""
    real = {"safe": safetensors.torch.save_file, "torch": torch.save, "text": Path.write_text}
    count = iter(range(10**6))

    def failing(kind):
        def write(*args, **kw):
            if next(count) in FAIL:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real[kind](*args, **kw)

        return write

    expected = right(name)
    for module in (shards, __import__("saeutils.lm.pretraining").lm.pretraining):
        monkeypatch.setattr(module, "save_file", failing("safe"))
    monkeypatch.setattr(torch, "save", failing("torch"))
    monkeypatch.setattr(Path, "write_text", failing("text"))
    monkeypatch.setenv("SAEUTILS_CACHE", str(tmp_path))
    monkeypatch.setenv("SAEUTILS_CAP", "")
    monkeypatch.delenv("SAEUTILS_CAP")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    failures = 0
    for _ in range(len(FAIL) + 1):
        try:
            assert WORK[name](lm, tmp_path) == expected
            break
        except OSError as error:
            assert error.errno == errno.ENOSPC
            failures += 1
    else:
        raise AssertionError("never came to an end")
    assert failures or name == "random twin"


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2]], ids=["empty", "truncated"])
@pytest.mark.parametrize("name", ["collection", "SAE"])
def test_empty_and_truncated_files(name, damage, right, lm, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SAEUTILS_CACHE", str(tmp_path))
    monkeypatch.setenv("SAEUTILS_CAP", "shard_tokens=1000")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert WORK[name](lm, tmp_path) == right(name)
    folders = [p for p in tmp_path.rglob("*") if p.is_dir() and p.name != "locks"]
    for path in [p for folder in folders for p in folder.iterdir() if p.is_file()]:
        whole = path.read_bytes()
        path.write_bytes(damage(whole))
        assert WORK[name](lm, tmp_path) == right(name), path


def test_only_what_is_ours_is_swept_away(tmp_path):
    """A user's hidden files in a folder that a run was given stay."""
    for name in (".git", f"{files.WRITING}step-0000001"):
        (tmp_path / name).mkdir()
    (tmp_path / ".gitignore").touch()
    (tmp_path / f"{files.WRITING}meta-x.json").touch()
    files.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".git", ".gitignore"]
