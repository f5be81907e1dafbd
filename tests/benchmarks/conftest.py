"""Benchmarks: peers out of PyPI beside us, ratios within one run, everything measured kept for README."""

import ctypes
import gc
import hashlib
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from matplotlib import ticker

from saeutils.kernels import files, memory
from saeutils.notebook import claims, plots

PEERS = ["dictionary-learning==0.1.0", "eai-sparsify==1.3.3", "natsort", "simple-parsing", "docstring-parser", "schedulefree", "einops"]  # fmt: skip
ROWS: list[dict] = []
SLOW, ENOUGH = 5.0, 0.4 if torch.cuda.is_available() else 3.0  # seconds: of a call after which one more is enough, of rounds of quicker ones


@pytest.fixture(scope="session", autouse=True)
def on_cpu() -> None:
    """Benchmarks run where people do: on the GPU, where there is one."""


@pytest.fixture(scope="session", autouse=True)
def two_threads():
    torch.set_num_threads(2)
    memory.reuse()  # for peers too


@pytest.fixture(scope="session")
def peers() -> Path:
    """A folder of their own: their other dependencies (nnsight, an older pandas) conflict and are not needed for a step."""
    folder = files.cache_dir("peers") / hashlib.sha256(" ".join(PEERS).encode()).hexdigest()[:12]
    if not (folder / "complete").exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *PEERS]
        subprocess.run(command, check=True)
        (folder / "complete").touch()
    sys.path.append(str(folder))
    for name in ("dictionary_learning", "dictionary_learning.trainers"):  # their own __init__ imports all of nnsight
        package = types.ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package
    return folder


class Peak:
    """Peak of memory above the start, in GiB: of the process on a CPU, of the allocator on a GPU.

    Around a first step: gradients and the optimiser's state count, parameters do not.
    """

    def __enter__(self) -> "Peak":
        gc.collect()  # earlier optimisers are cycles
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free and kept would hide what is taken
        self.process, self.done, self.gib = psutil.Process(), threading.Event(), 0.0
        self.start = self.process.memory_info().rss
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.005):
            self._look()

    def _look(self) -> None:
        used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else self.process.memory_info().rss
        self.gib = max(self.gib, (used - self.start) / 2**30)

    def __exit__(self, *_) -> None:
        self.done.set()
        self.thread.join()
        self._look()


@pytest.fixture(scope="session")
def record():
    """``record(section, row, who, seconds)`` keeps a measurement made otherwise; ``floor``: seconds in the same minute."""
    return lambda section, row, who, seconds, gib=float("nan"), floor=float("nan"): ROWS.append(
        {"section": section, "row": row, "who": who, "seconds": seconds, "peak GiB": gib, "floor": floor}
    )


@pytest.fixture
def measure(benchmark, record):
    """``measure(section, row, who, function, rounds)``: median seconds and peak memory, kept under that row and column.

    ``per``: how much of the measured thing one call does. ``floor``: timed before and after, as a machine's pace drifts.
    """

    def clock(function) -> float:
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def run(section: str, row: str, who: str, function, rounds: int = 3, per: float = 1, floor=None) -> None:
        def floors() -> list[float]:
            return [clock(floor) for _ in range(3 if clock(floor) < 1 else 1)] if floor else []

        before = floors()
        with Peak() as peak:
            once = clock(function)  # also the warm-up
        rounds = 1 if once > SLOW else max(rounds, int(ENOUGH / once))
        benchmark.pedantic(clock, (function,), rounds=rounds, warmup_rounds=0)
        beside = statistics.median(before + floors()) if floor else float("nan")
        record(section, row, who, benchmark.stats["median"] / per, peak.gib if per == 1 else float("nan"), beside)

    return run


def machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return (
        f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


def pytest_sessionfinish(session, exitstatus) -> None:
    """Print the table of ratios; after a run without failures ``SAEUTILS_SPEED=1`` keeps it in figures/speed, for README."""
    if not ROWS:
        return
    table = pd.DataFrame(ROWS)
    table["machine"] = machine()
    table["× floor"] = table["seconds"] / table["floor"]
    cost = table["× floor"].fillna(table["seconds"])  # beside a floor of its own minute a slow minute cancels
    ours = cost.where(table["who"] == "ours").groupby([table["section"], table["row"]]).transform("first")
    table["× ours"] = cost / ours
    print("\n" + machine())
    for values in ("seconds", "× floor", "× ours", "peak GiB"):
        shown = table.pivot_table(index=["section", "row"], columns="who", values=values, sort=False)
        print(f"\n{values}\n{shown.to_string(float_format=lambda v: f'{v:.3g}', na_rep='')}")
    if os.environ.get("SAEUTILS_SPEED") and exitstatus == 0:
        folder = claims.root() / "figures" / "speed"
        folder.mkdir(parents=True, exist_ok=True)
        on_gpu = torch.cuda.is_available()
        table.to_csv(folder / ("speed-gpu.csv" if on_gpu else "speed.csv"), index=False, float_format="%.4g")
        if not on_gpu:  # the figure is the processor's
            _draw(table[table["section"] == "scaling"], folder)


def _draw(scaling: pd.DataFrame, folder: Path) -> None:
    if not len(scaling):
        return
    scaling = scaling.assign(
        axis=scaling["row"].str.split().str[0],
        value=scaling["row"].str.split().str[1].astype(int),
    )
    fig, axes = plots.panels(3, 4.4, 3.4)
    for ax, (axis, part) in zip(axes, scaling.groupby("axis", sort=False)):
        part = part.rename(columns={"seconds": "TopK step", "floor": "one encoder matmul"})
        part = part.melt("value", ["TopK step", "one encoder matmul"], "what", "s").assign(ms=lambda t: t["s"] * 1e3)
        plots.lines(ax, part, "value", "ms", "what")
        ax.set(xscale="log", yscale="log", xlabel={"tokens": "tokens in a batch"}.get(axis, axis), ylabel="ms")
        ax.xaxis.set_minor_locator(ticker.NullLocator())
        ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_locator(ticker.NullLocator())
        ax.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
        ax.set_xticks(values := sorted(part["value"].unique()), [f"{v:,}" for v in values], fontsize=8)
        ax.legend(fontsize=8)
    plots.save(fig, folder, "scaling")
