"""Sweeps: independent jobs (arms × seeds × settings) side by side, which go on wherever they were stopped."""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any

from tqdm.auto import tqdm

from saeutils.kernels import files, parallel
from saeutils.kernels.door import door, optionally

UNSAFE = re.compile(r"[^\w.-]+")  # in a folder's name
MINUTES = 20  # a longer job loses too much when it is stopped


def sweep(
    run: str, jobs: Mapping[str, dict], work: Callable[..., Any], *, workers: int | None = None, ray: str | None = None,
    version: int = 1, progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Results of ``work(folder=…, **settings)`` for every job, in the order of the jobs; what was done before is read, not done again.

    A job's state lies in ``data/cache/runs/RUN/NAME-KEY``, KEY standing for its settings and ``version``, and where ``work`` is
    a notebook's function also for its code, its helpers' and the constants that they use: who edits such a cell gets new
    results. The result is ``result.json`` there, written whole when the job is done. ``work`` may keep its own checkpoints in ``folder`` and so go
    on inside a job. SAEs that share rows belong into one job, where they train in lock-step (``train`` takes several).

    Jobs run in processes of joblib, each pinned to a GPU of its own, or to its share of the cores with as many threads. With
    ``ray`` they run on that cluster, on a GPU or a CPU each, and jobs of a node that dies are done again on another.

    Args:
        jobs: name → settings, as JSON knows them.
        work: returns what JSON can hold (numbers, strings, lists, dicts); anything larger it leaves in ``folder``.
        workers: how many at a time. Default: one for each GPU, else for each physical core; all of a cluster. 1: this process,
            with all its threads.
        ray: address of a Ray cluster, ``HOST:PORT`` or ``auto`` (the one that this machine belongs to), or ``local``, a new one.
        version: raise it when ``work`` changes what it computes (a package's function: its code is not part of the key).

    Raises:
        ValueError: no jobs, workers below 1, no cluster at that address, a cache that cannot be written (all before any work).
        RuntimeError: jobs failed or their process died; the others have finished, and a second call does what is missing.
    """
    door(run=run, jobs=jobs, work=work, version=version)
    optionally(workers=workers)
    here = parallel.require_cluster(ray) if ray else parallel.workers_here()
    folders = _folders(run, jobs, version, work)
    done = {name: found for name, folder in folders.items() if (found := _read(folder)) is not None}
    left = {name: {"work": work, "folder": folders[name], "settings": jobs[name]} for name in jobs if name not in done}
    if left and progress:
        print(_state(run, list(done.values()), len(left)))
    failed = {}
    with tqdm(total=len(left), desc=run, unit=" jobs", disable=not progress or not left) as bar:
        for name, outcome in parallel.each(_timed, left, min(workers or here, max(1, len(left))), ray):
            if outcome.failed:
                failed[name] = outcome.failed
            else:
                done[name] = outcome.result
                _write(folders[name], done[name])
                if done[name]["seconds"] > 60 * MINUTES:
                    print(f"job {name} took {done[name]['seconds'] / 60:.0f} min: make two of it, a stopped one starts again")
            bar.update()
    if len(done) < len(jobs):
        raise RuntimeError(_report(jobs, done, failed))
    return {name: done[name]["result"] for name in jobs}


def finished(run: str, jobs: Mapping[str, dict], work: Callable[..., Any], *, version: int = 1) -> dict[str, bool]:
    """Which jobs of :func:`sweep` have left their result."""
    door(run=run, jobs=jobs, work=work, version=version)
    return {name: _read(folder) is not None for name, folder in _folders(run, jobs, version, work).items()}


def _timed(work: Callable[..., Any], folder: Path, settings: dict) -> dict:
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    result = work(folder=folder, **settings)
    try:
        json.dumps(result)
    except TypeError as error:
        raise ValueError(f"the job returned what JSON cannot hold ({error}): return numbers, lists, dicts") from error
    return {"result": result, "seconds": round(time.monotonic() - began, 1)}


def _report(jobs: Mapping[str, dict], done: dict, failed: dict[str, str]) -> str:
    parts = [f"{name} {json.dumps(jobs[name], default=str)}:\n{text.strip()}" for name, text in failed.items()]
    if lost := [name for name in jobs if name not in done and name not in failed]:
        parts.append(f"{', '.join(lost)}: the process died, as it does when memory runs out: fewer workers")
    return f"{len(jobs) - len(done)} of {len(jobs)} jobs have no result; call sweep again and it does only those\n" + "\n".join(parts)


def _folders(run: str, jobs: Mapping[str, dict], version: int, work: Callable[..., Any]) -> dict[str, Path]:
    written, root = _written(work), files.cache_dir("runs", run)
    keys = {name: files.key(name, settings, version, written) for name, settings in jobs.items()}
    return {name: root / f"{UNSAFE.sub('-', name)}-{key}" for name, key in keys.items()}


def _written(work: Callable[..., Any]) -> dict[str, Any]:
    """What a notebook (or a script) says of ``work``: its code, that of its helpers, and the constants that they use."""
    found: dict[str, Any] = {}
    spaces: dict[str, SimpleNamespace] = {}  # a notebook's settings, of which those count that are named
    names, todo = set(), [("", work)]
    while todo:
        name, value = todo.pop()
        own = getattr(value, "__module__", "") == "__main__"
        if own and isinstance(value, type):
            todo += vars(value).items()
        elif own and isinstance(value, FunctionType) and value.__qualname__ not in found:
            found[value.__qualname__] = code = list(_code(value.__code__))
            used = {n for _, of, _ in code for n in of}
            names |= used
            todo += [(n, value.__globals__[n]) for n in used & set(value.__globals__)]
            todo.append((f"{value.__qualname__}()", list(value.__defaults__ or ())))
        elif isinstance(value, SimpleNamespace):
            spaces[name] = value
        elif isinstance(value, int | float | str | list | tuple | dict):
            found[name] = value
    return found | {f"{n}.{k}": v for n, space in spaces.items() for k, v in vars(space).items() if k in names}


def _code(code: CodeType) -> Iterator[tuple[str, tuple[str, ...], list]]:
    """Instructions, names and constants of a function, and of the comprehensions and functions in it."""
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    plain = [c for c in code.co_consts if not isinstance(c, CodeType)]
    yield code.co_code.hex(), code.co_names, [sorted(map(repr, c)) if isinstance(c, frozenset) else c for c in plain]
    for part in inner:
        yield from _code(part)


def _read(folder: Path) -> dict | None:
    found = files.read_json(folder / "result.json", "doing this job again")
    return found if {"result", "seconds"} <= set(found) else None


def _write(folder: Path, found: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)  # on a cluster the job's own lies on another machine
    with files.whole(folder / "result.json") as tmp:
        tmp.write_text(json.dumps(found))


def _state(run: str, done: list[dict], left: int) -> str:
    text = f"{run}: {len(done)} of {len(done) + left} jobs done, {left} left"
    if done:
        text += f", about {left * sum(d['seconds'] for d in done) / len(done) / 60:.0f} min"
    return text
