"""Runs of named jobs that go on wherever they were stopped, and files that are whole or not there."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from saeutils.kernels import files, jobs

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAEUTILS_CACHE", str(tmp_path))
    return tmp_path


class Work:
    """Counts what it was asked for."""

    def __init__(self):
        self.done = []

    def __call__(self, folder: Path, seed: int, steps: int = 1) -> dict:
        assert folder.is_dir()
        self.done.append(seed)
        return {"loss": seed / 2, "steps": steps}


def test_a_run_does_only_what_is_missing(capsys):
    work, three = Work(), {f"plain, seed {i}": {"seed": i} for i in range(3)}
    first = jobs.run_jobs("trial", dict(list(three.items())[:2]), work, progress=False)
    assert jobs.finished("trial", three) == {"plain, seed 0": True, "plain, seed 1": True, "plain, seed 2": False}
    again = jobs.run_jobs("trial", three, work)
    assert work.done == [0, 1, 2] and list(again) == list(three) and again["plain, seed 1"] == first["plain, seed 1"]
    assert "trial: 2 of 3 jobs done, 1 left, about 0 min" in capsys.readouterr().out


def test_other_settings_or_another_version_are_other_jobs():
    work = Work()
    for settings, version in (({"seed": 0}, 1), ({"seed": 0, "steps": 5}, 1), ({"seed": 0}, 2), ({"seed": 0}, 1)):
        jobs.run_jobs("trial", {"a": settings}, work, version=version, progress=False)
    assert work.done == [0, 0, 0]


def test_a_damaged_result_is_done_again(cache, capsys):
    work = Work()
    jobs.run_jobs("trial", {"a": {"seed": 0}}, work, progress=False)
    (result,) = cache.rglob("result.json")
    for text in ("", '{"result": 1', "{}"):
        result.write_text(text)
        assert jobs.run_jobs("trial", {"a": {"seed": 0}}, work, progress=False)["a"]["loss"] == 0
    assert work.done == [0] * 4 and "is damaged: doing this job again" in capsys.readouterr().out


def test_bad_input(capsys, monkeypatch):
    with pytest.raises(ValueError, match="has no jobs"):
        jobs.run_jobs("trial", {}, Work())
    with pytest.raises(ValueError, match="job a returned what JSON cannot hold"):
        jobs.run_jobs("trial", {"a": {}}, lambda folder: {1, 2}, progress=False)
    assert jobs.finished("trial", {"a": {}}) == {"a": False}
    monkeypatch.setattr(jobs, "MINUTES", -1)
    jobs.run_jobs("trial", {"b": {}}, lambda folder: 1, progress=False)
    assert "make two of it" in capsys.readouterr().out


def test_a_killed_run_goes_on(cache):
    code = """
import time
from saeutils.kernels import jobs
def work(folder, seed):
    time.sleep(0.3)
    return seed
jobs.run_jobs("trial", {f"job {i}": {"seed": i} for i in range(5)}, work)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while not list(cache.rglob("result.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    five = {f"job {i}": {"seed": i} for i in range(5)}
    done = sum(jobs.finished("trial", five).values())
    assert 1 <= done < 5
    work = Work()
    found = jobs.run_jobs("trial", five, work, progress=False)
    assert len(work.done) == 5 - done and found["job 0"] == 0


def _write(path: Path, text: str) -> None:
    for _ in range(200):
        with files.whole(path) as tmp:
            tmp.write_text(text)


def test_two_processes_write_one_file_whole(tmp_path):
    path, texts = tmp_path / "table.json", [json.dumps(["a"] * 3000), json.dumps(["b"] * 5000)]
    writers = [multiprocessing.get_context("spawn").Process(target=_write, args=(path, text)) for text in texts]
    for writer in writers:
        writer.start()
    while any(w.is_alive() for w in writers):
        if path.exists():
            assert path.read_text() in texts
    assert [w.exitcode for w in writers] == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]


def test_what_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "card.json"
    path.write_text("old")
    with pytest.raises(OSError), files.whole(path) as tmp:
        tmp.write_text("half")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["card.json"]
    with files.whole(path) as tmp:
        assert tmp.suffix == ".json" and tmp.parent == tmp_path
        tmp.write_text("new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o044


def test_a_key_depends_on_all_parts_and_on_no_order():
    assert files.key({"a": 1, "b": [2]}, "x") == files.key({"b": [2], "a": 1}, "x") != files.key({"a": 1, "b": [3]}, "x")
    assert files.key(1) == "080a9ed428559ef6"  # of every long run's folders: a change makes them all start again
