"""Long work in pieces: caps of a rehearsal, and runs of named jobs that go on wherever they were stopped."""

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from saeutils.kernels import files

MINUTES = 20  # a longer job loses too much when it is stopped


def caps() -> dict[str, int]:
    """``$SAEUTILS_CAP``, such as ``tokens=4000,steps=8``: upper bounds for a rehearsal of the larger scales.

    Raises:
        ValueError: it is set and is not such a list (a blank or a typo would switch a cap off without a word).
    """
    found = {}
    for part in os.environ.get("SAEUTILS_CAP", "").split(",") if "SAEUTILS_CAP" in os.environ else []:
        if not (match := re.fullmatch(r"([a-z_0-9]+)=(\d+)", part)):
            raise ValueError(f"SAEUTILS_CAP has {part!r}: write name=number,name=number without blanks, or unset it")
        found[match[1]] = int(match[2])
    return found


def run_jobs(
    run: str, jobs: Mapping[str, dict], work: Callable[..., Any], *, version: int = 1, progress: bool = True
) -> dict[str, Any]:
    """Results of ``work(folder=…, **settings)`` for every job, in their order; what was done before is read, not done again.

    A job's state lies in ``data/cache/runs/RUN/NAME-KEY``, KEY standing for its settings and ``version``; its result is
    ``result.json`` there, written whole when the job is done. ``work`` may keep its own checkpoints in ``folder`` and so go
    on inside a job. The run says at its start what is done and what is left, and names jobs over 20 minutes.

    Args:
        jobs: name → settings, as JSON knows them.
        work: returns what JSON can hold (numbers, strings, lists, dicts); anything larger it leaves in ``folder``.
        version: raise it when ``work`` changes what it computes.

    Raises:
        ValueError: no jobs, a result that JSON cannot hold.
    """
    if not jobs:
        raise ValueError(f"{run} has no jobs: give at least one")
    folders = {name: _folder(run, name, settings, version) for name, settings in jobs.items()}
    results = {name: found for name, folder in folders.items() if (found := _read(folder)) is not None}
    left = [name for name in jobs if name not in results]
    if left and progress:
        print(_state(run, list(results.values()), len(left)))
    for name in tqdm(left, desc=run, unit=" jobs", disable=not progress or not left):
        began = time.monotonic()
        folders[name].mkdir(parents=True, exist_ok=True)
        result = work(folder=folders[name], **jobs[name])
        results[name] = {"result": result, "seconds": round(time.monotonic() - began, 1)}
        _write(folders[name], name, results[name])
        if results[name]["seconds"] > 60 * MINUTES:
            print(f"job {name} took {results[name]['seconds'] / 60:.0f} min: make two of it, a stopped one starts again")
    return {name: results[name]["result"] for name in jobs}


def finished(run: str, jobs: Mapping[str, dict], *, version: int = 1) -> dict[str, bool]:
    """Which jobs of :func:`run_jobs` have left their result."""
    return {name: _read(_folder(run, name, settings, version)) is not None for name, settings in jobs.items()}


def _folder(run: str, name: str, settings: dict, version: int) -> Path:
    safe = re.sub(r"[^\w.-]+", "-", name)
    return files.cache_dir("runs", run) / f"{safe}-{files.key(name, settings, version)}"


def _read(folder: Path) -> dict | None:
    try:
        found = json.loads((folder / "result.json").read_text())
        return found if {"result", "seconds"} <= set(found) else None
    except FileNotFoundError:
        return None
    except ValueError:  # of another program, or a disk that lost it: the job is done again
        print(f"{folder / 'result.json'} is damaged: doing this job again")
        return None


def _write(folder: Path, name: str, found: dict) -> None:
    try:
        text = json.dumps(found)
    except TypeError as error:
        raise ValueError(f"job {name} returned what JSON cannot hold ({error}): return numbers, lists, dicts") from error
    with files.whole(folder / "result.json") as tmp:
        tmp.write_text(text)


def _state(run: str, done: list[dict], left: int) -> str:
    text = f"{run}: {len(done)} of {len(done) + left} jobs done, {left} left"
    if done:
        text += f", about {left * sum(d['seconds'] for d in done) / len(done) / 60:.0f} min"
    return text
