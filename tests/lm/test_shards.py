"""Shards of one set of activations made side by side: by processes, by machines that share a folder, by what others left behind."""

import hashlib
import os
import signal
import time
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset

from saeutils.lm import activations, shards

TEXT = [f"the quick brown fox {i} jumps over the lazy dog " * 4 for i in range(160)]


def collected(lm: str, cache: Path, workers: int = 1) -> str:
    """All files of the folder, as a hash."""
    os.environ |= {"SAEUTILS_CACHE": str(cache), "SAEUTILS_CAP": "shard_tokens=1000", "TQDM_DISABLE": "1"}
    text = Dataset.from_dict({"text": TEXT})
    acts = activations.collect(lm, "blocks.1.hook_resid_post", text, context=64, dtype=torch.float32, workers=workers)
    files = [*sorted(acts.folder.glob("*.safetensors")), acts.folder / "meta.json"]
    assert [f.name for f in files[:-1]] == [shards.name_of(n) for n in range(len(files) - 1)] and len(files) > 8
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def swept(cache: Path) -> bool:
    """Is nothing left of claims, cards and half-written files?"""
    (folder,) = (cache / "activations").iterdir()
    return all(f.suffix == ".safetensors" or f.name == "meta.json" for f in folder.iterdir())


def machine(name: str, lm: str, cache: Path, out: Path, pause: float = 0.0, last: int = 0) -> None:
    """Collects as a machine of that name, and writes how many shards it made itself; `last` > 0: it is killed at work on that one."""
    torch.set_num_threads(1)
    shards.HOST = name
    made, rows = [], shards.Collector.rows

    def noted(self, pool, *rest):
        made.append(len(list(pool)))
        time.sleep(pause)
        if len(made) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return rows(self, pool, *rest)

    shards.Collector.rows = noted
    (out / name).write_text(f"{collected(lm, cache)} {len(made)}")


@pytest.fixture(scope="module")
def start():
    """Starts a process forked from one that has imported everything."""
    context = tiny.forks("transformers", "datasets", "saeutils.lm.activations")

    def begin(*args):
        process = context.Process(target=machine, args=args)
        process.start()
        return process

    return begin


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    for name in ("SAEUTILS_CACHE", "SAEUTILS_CAP", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "")  # is as before afterwards


@pytest.fixture(scope="module")
def lm():
    return tiny.saved("llama")


@pytest.fixture(scope="module")
def serial(start, lm, tmp_path_factory):
    out = tmp_path_factory.mktemp("serial")
    start("one", lm, out / "cache", out).join()
    return (out / "one").read_text().split()


def test_workers_make_the_same_bytes(lm, serial, tmp_path):
    assert collected(lm, tmp_path, workers=2) == serial[0] and swept(tmp_path)


def test_two_machines_share_the_work(start, lm, serial, tmp_path):
    both = [start(name, lm, tmp_path / "cache", tmp_path, 0.05) for name in ("one", "two")]
    for process in both:
        process.join()
    first, second = ((tmp_path / name).read_text().split() for name in ("one", "two"))
    assert first[0] == second[0] == serial[0] and swept(tmp_path / "cache")
    assert int(first[1]) + int(second[1]) == int(serial[1]) and min(int(first[1]), int(second[1])) > 1


def test_a_machine_that_fell_silent_is_not_waited_for(start, lm, serial, tmp_path, monkeypatch):
    start("far", lm, tmp_path / "cache", tmp_path, 0.0, 3).join()
    (claim,) = (tmp_path / "cache").rglob(".claim-*")
    monkeypatch.setattr(shards, "STALE", 1.0)
    began = time.monotonic()
    assert collected(lm, tmp_path / "cache") == serial[0] and not claim.exists() and swept(tmp_path / "cache")
    assert time.monotonic() - began > 0.5, "its claim was respected for a while"


def test_a_process_of_this_machine_that_died_is_known_to_be_dead(start, lm, serial, tmp_path, capsys):
    start(shards.HOST, lm, tmp_path / "cache", tmp_path, 0.0, 3).join()
    assert any((tmp_path / "cache").rglob(".claim-*")) and collected(lm, tmp_path / "cache") == serial[0] and swept(tmp_path / "cache")
    assert "waiting" not in capsys.readouterr().out
