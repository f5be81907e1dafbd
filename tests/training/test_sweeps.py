"""Sweeps of named jobs: in this process, in others, on a cluster; stopped and started again; with failures."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from saeutils.kernels import parallel
from saeutils.saes import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig
from saeutils.training import finished, sweep, sweeps, train

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


here = partial(sweep, workers=1)  # in this process


def test_a_sweep_does_only_what_is_missing(capsys):
    work, three = Work(), {f"plain, seed {i}": {"seed": i} for i in range(3)}
    first = here("trial", dict(list(three.items())[:2]), work, progress=False)
    assert finished("trial", three, work) == {"plain, seed 0": True, "plain, seed 1": True, "plain, seed 2": False}
    again = here("trial", three, work)
    assert work.done == [0, 1, 2] and list(again) == list(three) and again["plain, seed 1"] == first["plain, seed 1"]
    assert "trial: 2 of 3 jobs done, 1 left, about 0 min" in capsys.readouterr().out


def test_other_settings_or_another_version_are_other_jobs():
    work = Work()
    for settings, version in (({"seed": 0}, 1), ({"seed": 0, "steps": 5}, 1), ({"seed": 0}, 2), ({"seed": 0}, 1)):
        here("trial", {"a": settings}, work, version=version, progress=False)
    assert work.done == [0, 0, 0]


NOTEBOOK = """
from types import SimpleNamespace
from saeutils.training import sweep

S = SimpleNamespace(step=0.5, shown=3)
TIMES = 2

class Model:
    def forward(self, x):
        return x + 1

def helper(x, plus=0):
    return [Model().forward(x) * TIMES + plus for _ in range(1)][0]

def work(folder, x):
    print("at work")  # a comment
    return helper(x) * S.step

print(sweep("cells", {"a": {"x": 1}}, work, workers=1, progress=False))
"""


def test_who_edits_a_notebooks_function_gets_new_results(cache):
    def says(*edit: str) -> list[str]:
        run = subprocess.run([sys.executable, "-c", NOTEBOOK.replace(*edit) if edit else NOTEBOOK], cwd=ROOT, capture_output=True, text=True)
        assert not run.returncode, run.stderr
        return run.stdout.splitlines()

    assert says() == ["at work", "{'a': 2.0}"]
    assert says() == says("# a comment", "# another") == says("shown=3", "shown=4") == ["{'a': 2.0}"]
    for edit, result in (("x + 1", "x + 2"), 3.0), (("TIMES = 2", "TIMES = 4"), 4.0), (("step=0.5", "step=1.5"), 6.0), (("range(1)", "range(3)"), 2.0), (("plus=0", "plus=2"), 3.0):
        assert says(*edit) == ["at work", f"{{'a': {result}}}"]
        assert says(*edit) == [f"{{'a': {result}}}"]


def test_a_damaged_result_is_done_again(cache, capsys):
    work = Work()
    here("trial", {"a": {"seed": 0}}, work, progress=False)
    (result,) = cache.rglob("result.json")
    for text in ("", '{"result": 1', "{}"):
        result.write_text(text)
        assert here("trial", {"a": {"seed": 0}}, work, progress=False)["a"]["loss"] == 0
    assert work.done == [0] * 4 and "is damaged: doing this job again" in capsys.readouterr().out


def test_long_jobs_are_told(capsys, monkeypatch):
    monkeypatch.setattr(sweeps, "MINUTES", -1)
    here("trial", {"b": {}}, lambda folder: 1, progress=False)
    assert "make two of it" in capsys.readouterr().out


def falls(folder: Path, n: int) -> object:
    """Fails for 1, dies for 2 whenever it is tried, returns a set for 3."""
    if n == 1:
        raise ValueError("no such layer")
    if n == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return {n} if n == 3 else n


def test_a_failed_job_is_reported_with_its_settings_while_the_others_finish():
    jobs = {f"job {n}": {"n": n} for n in (0, 1, 3, 4)}
    for workers in (1, 2):
        with pytest.raises(RuntimeError) as told:
            sweep(f"falls {workers}", jobs, falls, workers=workers, progress=False)
        text = str(told.value)
        assert text.startswith("2 of 4 jobs have no result") and 'job 1 {"n": 1}:' in text and "ValueError: no such layer" in text
        assert 'job 3 {"n": 3}:' in text and "what JSON cannot hold" in text
        assert finished(f"falls {workers}", jobs, falls) == {"job 0": True, "job 1": False, "job 3": False, "job 4": True}


def test_a_process_that_dies_is_told_and_takes_no_other_job_with_it():
    jobs = {f"job {n}": {"n": n} for n in (2, 0, 4, 6, 8)}
    with pytest.raises(RuntimeError, match=r"job 2: the process died, as it does when memory runs out"):
        sweep("dies", jobs, falls, workers=2, progress=False)
    assert finished("dies", jobs, falls) == {f"job {n}": n != 2 for n in (2, 0, 4, 6, 8)}
    assert here("dies", jobs | {"job 2": {"n": 4}}, falls, progress=False)["job 2"] == 4


def trained(folder: Path, seed: int, k: int) -> dict:
    """A small SAE, trained with a checkpoint in its folder."""
    torch.manual_seed(seed)
    sae = SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(d_in=32, d_sae=128, k=k))
    rows = torch.randn(40 * 64, 32, generator=torch.Generator().manual_seed(seed)).split(64)
    history = train(sae, lambda start=0: iter(rows[start:]), 40, checkpoint=folder, progress=False)
    return {"fvu": history["fvu"].tolist(), "threads": torch.get_num_threads(), "cores": len(os.sched_getaffinity(0))}


def test_processes_give_what_this_one_gives():
    jobs = {f"k {k}, seed {seed}": {"k": k, "seed": seed} for k in (2, 4) for seed in (0, 1)}
    before, serial = torch.get_num_threads(), {}
    torch.set_num_threads(max(1, parallel.joblib.cpu_count() // 2))
    try:
        serial = here("serial", jobs, trained, progress=False)
    finally:
        torch.set_num_threads(before)
    side_by_side = sweep("parallel", jobs, trained, workers=2, progress=False)
    assert list(side_by_side) == list(jobs)
    assert [r["fvu"] for r in side_by_side.values()] == [r["fvu"] for r in serial.values()]
    assert {r["threads"] for r in side_by_side.values()} == {max(1, parallel.joblib.cpu_count() // 2)}
    cores = len(os.sched_getaffinity(0))
    assert all(r["cores"] in (cores // 2, cores - cores // 2) for r in side_by_side.values())


def slow(folder: Path, seed: int) -> int:
    """Leaves word of every start; half a second."""
    (folder / f"start-{time.time_ns()}").touch()
    time.sleep(0.5)
    return seed


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_sweep_goes_on(cache, workers):
    code = f"""
    import sys
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    from test_sweeps import slow
    from saeutils.training import sweep
    sweep("trial", {{f"job {{i}}": {{"seed": i}} for i in range(6)}}, slow, workers={workers})
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, start_new_session=True)
    while not list(cache.rglob("result.json")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    six = {f"job {i}": {"seed": i} for i in range(6)}
    done = {name for name, is_done in finished("trial", six, slow).items() if is_done}
    assert 1 <= len(done) < 6
    assert sweep("trial", six, slow, workers=workers, progress=False) == {f"job {i}": i for i in range(6)}
    for name in done:
        (folder,) = (cache / "runs" / "trial").glob(f"{name.replace(' ', '-')}-*")
        assert len(list(folder.glob("start-*"))) == 1, "what was done is not done again"


@pytest.mark.parametrize("workers", [0, -1, 1.5, "2", np.nan])
def test_workers_are_counted(workers):
    with pytest.raises(ValueError, match=f"workers={workers!r}: expected a whole number of at least 1"):
        sweep("trial", {"a": {}}, Work(), workers=workers)


def test_a_cluster_that_does_not_answer_is_told_before_any_work():
    work = Work()
    wanted = "no cluster answers there" if parallel.importlib.util.find_spec("ray") else "Ray is not installed"
    with pytest.raises(ValueError, match=f"ray='127.0.0.1:1'.*{wanted}"):
        sweep("trial", {"a": {"seed": 1}}, work, ray="127.0.0.1:1")
    assert not work.done


def test_a_cache_that_cannot_be_written_is_told_before_any_work(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SAEUTILS_CACHE", str(tmp_path / "file"))
    work = Work()
    with pytest.raises(OSError, match="file"):
        here("trial", {"a": {"seed": 1}}, work)
    assert not work.done
