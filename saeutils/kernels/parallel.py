"""Independent jobs side by side: joblib's processes, each on cores or a GPU of its own, or a Ray cluster."""

import concurrent.futures
import importlib.util
import itertools
import os
import socket
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import joblib
from filelock import FileLock, Timeout

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # of NumPy's and SciPy's products


class Outcome(NamedTuple):
    """What a job gave: its result, or the traceback of its failure."""

    result: Any
    failed: str = ""


def workers_here() -> int:
    """One for each GPU, else one for each physical core."""
    import torch

    return torch.cuda.device_count() or joblib.cpu_count(only_physical_cores=True)


def each(
    work: Callable[..., Any], jobs: Mapping[str, dict], workers: int, ray: str | None = None
) -> Iterator[tuple[str, Outcome]]:
    """(name, outcome) of ``work(**settings)`` for every job, in the order in which they end.

    One worker without Ray is this process itself, with all its threads. A failed job is an outcome like others. Where a
    worker process dies (killed for memory, as a rule) what was not done begins again; jobs that die alone, too, are not yielded.
    """
    if workers == 1 and not ray:
        for name, settings in jobs.items():
            yield name, _tried(work, settings)
        return
    environment = {k: v for k, v in os.environ.items() if k.startswith(("SAEUTILS_", "HF_"))}
    if ray:
        yield from _on_cluster(work, jobs, workers, environment, ray)
        return
    left = dict(jobs)
    for at_once in (workers, workers, 1):  # a process that dies takes all others with it: what they had not ended begins again
        try:
            for name, outcome in _side_by_side(work, left, workers, environment, at_once):
                del left[name]
                yield name, outcome
        except joblib.externals.loky.process_executor.TerminatedWorkerError:
            continue


def _side_by_side(
    work: Callable[..., Any], jobs: dict[str, dict], workers: int, environment: dict, at_once: int
) -> Iterator[tuple[str, Outcome]]:
    """In loky's processes, the outcomes as they come; one ``at_once``: a job whose process dies takes no other with it."""
    executor = joblib.externals.loky.get_reusable_executor
    warnings.filterwarnings("ignore", message="A worker stopped while some jobs")  # loky renews workers whose memory has grown
    parts = [dict([job]) for job in jobs.items()] if at_once == 1 else [dict(jobs)]
    for part in parts if jobs else ():
        pool = executor(at_once, timeout=60, env=dict.fromkeys(THREADS, str(_share(workers))))
        futures = [pool.submit(_placed, name, work, settings, workers, environment) for name, settings in part.items()]
        for future in concurrent.futures.as_completed(futures):
            try:
                yield future.result()
            except joblib.externals.loky.process_executor.TerminatedWorkerError:
                if at_once > 1:
                    raise


def end() -> None:
    """End the processes that wait for further jobs, with what they hold in memory."""
    joblib.externals.loky.get_reusable_executor().shutdown(kill_workers=True)


def _on_cluster(
    work: Callable[..., Any], jobs: Mapping[str, dict], workers: int, environment: dict, address: str
) -> Iterator[tuple[str, Outcome]]:
    """Ray's tasks, which it does again when their node dies. (joblib's Ray backend gives no result before the last job has ended.)"""
    import ray

    gpus = 1 if _connected(address).get("GPU") else 0
    task, waiting, running = ray.remote(num_gpus=gpus, max_retries=3)(_placed), list(jobs.items()), {}
    while waiting or running:
        while waiting and len(running) < workers:
            name, settings = waiting.pop(0)
            running[task.remote(name, work, settings, 0, environment)] = name
        (ready,), _ = ray.wait(list(running))
        name = running.pop(ready)
        try:
            yield ray.get(ready)
        except ray.exceptions.RayError as error:  # its process died, four times, or its node lacks what it needs
            yield name, Outcome(None, str(error))


def _connected(address: str) -> dict[str, float]:
    """What the cluster has: CPU, GPU, ..."""
    import ray

    if not ray.is_initialized():
        ray.init(address=None if address == "local" else address, log_to_driver=False)
    return ray.cluster_resources()


def require_cluster(address: str) -> int:
    """How many jobs the Ray cluster at ``address`` takes at once, one for each GPU or else for each CPU.

    Raises:
        ValueError: ray is not installed; nobody answers there.
    """
    if not importlib.util.find_spec("ray"):
        raise ValueError(f"ray={address!r}, but Ray is not installed: pip install 'saeutils[ray]'")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdecimal():
            socket.create_connection((host, int(port)), timeout=5).close()
        found = _connected(address)
    except (OSError, ConnectionError) as error:
        raise ValueError(f"ray={address!r}: no cluster answers there ({error}): start one (ray start --head), or leave ray out") from error
    return int(found.get("GPU") or found["CPU"])


def _share(workers: int) -> int:
    return max(1, joblib.cpu_count() // workers)


def _placed(name: str, work: Callable[..., Any], settings: dict, workers: int, environment: dict) -> tuple[str, Outcome]:
    """One job in a worker process: on a place of its own among ``workers`` (0: wherever Ray has put it)."""
    import torch

    os.environ |= environment | {"TQDM_DISABLE": "1"}  # one bar for all, in the process that asked
    if not workers:
        torch.set_num_threads(1)
        return name, _tried(work, settings)
    torch.set_num_threads(_share(workers))
    with _place(workers) as place:
        gpus = torch.cuda.device_count()
        with torch.cuda.device(place % gpus) if gpus else _pinned(place, workers):
            return name, _tried(work, settings)


@contextmanager
def _place(workers: int) -> Iterator[int]:
    """A number below ``workers``, of those that fewest processes of this machine hold; a dead one holds nothing."""
    folder = Path(tempfile.gettempdir()) / f"saeutils-places-{os.getuid() if hasattr(os, 'getuid') else 0}"
    folder.mkdir(exist_ok=True)
    for number in itertools.count():  # from the second round on beside another sweep of this machine
        lock = FileLock(folder / f"{number}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        try:
            yield number % workers
        finally:
            lock.release()
        return


@contextmanager
def _pinned(place: int, workers: int) -> Iterator[None]:
    """This process on its share of the cores, where the system can pin."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = sorted(os.sched_getaffinity(0))
    own = before[place * len(before) // workers : (place + 1) * len(before) // workers]
    os.sched_setaffinity(0, own or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _tried(work: Callable[..., Any], settings: dict) -> Outcome:
    try:
        return Outcome(work(**settings))
    except Exception:
        return Outcome(None, traceback.format_exc())
