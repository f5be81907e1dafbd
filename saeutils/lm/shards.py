"""A folder of shards, filled by any number of processes and of machines that share it.

There is no lock: who makes a shard says so in a file of its own, its claim, and renews it. At worst a shard is made twice, with the
same bytes: clocks of machines that share a folder should agree within minutes.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

import psutil
from datasets import Dataset
from safetensors.torch import save_file
from tqdm.auto import tqdm

from saeutils.kernels import files, parallel
from saeutils.lm import models
from saeutils.lm.collector import Collector, pools, tokenize

HOST = socket.gethostname()
STALE = 600.0  # seconds after which a claim that was not renewed is taken to be abandoned, whoever made it
RENEWED = 20.0  # seconds between two renewals


def name_of(n: int) -> str:
    """The file of shard ``n``."""
    return f"shard-{n:05d}.safetensors"


class Filling:
    """What one process needs to make shards: the cut text, and (once it makes one) the language model."""

    def __init__(self, folder: Path, lm: str, hook: str, text: Dataset, settings: dict, load: dict):
        self.folder, self.lm, self.hook, self.settings, self.load = folder, lm, hook, settings, load
        tokenizer = models.load_tokenizer(lm, load.get("revision"))
        self.windows = tokenize(text, tokenizer, settings["context"], settings["n_tokens"], settings["seed"])
        self.cut = pools(self.windows, settings["seed"])
        self.known = files.read_json(folder / "meta.json").get("shards", {})

    @cached_property
    def collector(self) -> Collector:
        return Collector(self.lm, self.hook, self.settings["batch_tokens"], **self.load)

    def tokens(self, n: int) -> int:
        """How many tokens shard ``n`` takes to make."""
        return sum(len(self.windows.tokens[i]) for i in self.cut[n])

    def card(self, n: int) -> Path:
        """Stands beside a whole shard until all are made: rows, width, SHA-256."""
        return (self.folder / name_of(n)).with_suffix(".json")

    def made(self, numbers: Iterable[int]) -> set[int]:
        """Which of these shards are there, whoever made them."""
        complete = self.complete()
        return {n for n in numbers if complete or name_of(n) in self.known or self.card(n).exists()}

    def complete(self) -> bool:
        """Has somebody written down that all are made?"""
        return files.read_json(self.folder / "meta.json").get("complete", False)

    def make(self, n: int) -> None:
        """Make shard ``n``, unless it is there or another process is at it."""
        path = self.folder / name_of(n)
        with _claimed(path) as mine:
            if not mine or self.made([n]):
                return
            rows = self.collector.rows(self.cut[n], self.windows, self.settings["outlier"])
            with files.whole(path) as tmp:
                save_file(rows, tmp)
            about = {"rows": len(rows["x"]), "d": rows["x"].shape[1], "sha256": files.sha256_of(path)}
            with files.whole(self.card(n)) as tmp:
                tmp.write_text(json.dumps(about))

    def seal(self) -> None:
        """Write down that all shards are made, and of each its rows and SHA-256."""
        cards = {name_of(n): files.read_json(self.card(n)) for n in range(len(self.cut)) if name_of(n) not in self.known}
        if self.complete():  # another was quicker, and may have taken the cards away
            return
        d = next((card["d"] for card in cards.values()), None) or files.read_json(self.folder / "meta.json")["d"]
        shards = self.known | {name: {"rows": card["rows"], "sha256": card["sha256"]} for name, card in cards.items()}
        meta = {"lm": self.lm, "hook": self.hook, **self.settings, "d": d, "shards": dict(sorted(shards.items())), "complete": True}
        write_meta(self.folder, meta)
        for n in range(len(self.cut)):
            self.card(n).unlink(missing_ok=True)


def write_meta(folder: Path, meta: dict) -> None:
    """``meta.json`` of a folder, whole or not at all."""
    with files.whole(folder / "meta.json") as tmp:
        tmp.write_text(json.dumps(meta, indent=1))


def fill(folder: Path, lm: str, hook: str, text: Dataset, settings: dict, load: dict, workers: int) -> None:
    """Make the shards that are missing, with as many processes, beside whoever else is at this folder.

    Raises:
        ValueError: as :func:`saeutils.lm.activations.collect`.
    """
    for card in folder.glob("shard-*.json"):  # of a run that was stopped: is the shard beside it what it says?
        shard = card.with_suffix(".safetensors")
        if not shard.exists() or files.sha256_of(shard) != files.read_json(card).get("sha256"):
            card.unlink(missing_ok=True)
    arguments = dict(folder=folder, lm=lm, hook=hook, text=text, settings=settings, load=load)
    filling = Filling(**arguments)
    left = set(range(len(filling.cut)))
    left -= filling.made(left)
    done = sum(filling.tokens(n) for n in range(len(filling.cut)) if n not in left)
    total = done + sum(map(filling.tokens, left))
    with tqdm(total=total, initial=done, unit=" tok", unit_scale=True, desc=hook) as bar:

        def count() -> None:
            made = filling.made(left)
            left.difference_update(made)
            bar.update(sum(map(filling.tokens, made)))

        if workers > 1 and len(left) > 1:
            helpers, failed = {str(i): arguments for i in range(min(workers, len(left)))}, []
            at_work = threading.Thread(target=lambda: failed.extend(o.failed for _, o in parallel.each(_help, helpers, len(helpers))), daemon=True)
            at_work.start()
            try:
                while at_work.is_alive():
                    at_work.join(0.2)
                    count()
            finally:  # with the LMs that they hold; after an interrupt, too
                parallel.end()
            if any(failed):
                print(f"a worker failed, this process makes the rest: {next(filter(None, failed)).strip().splitlines()[-1]}")
        for _ in _in_turn(filling, left):  # alone, or what processes that died have left
            count()
    filling.seal()


def _help(**arguments) -> None:
    filling = Filling(**arguments)
    for n in range(len(filling.cut)):
        if not filling.made([n]):
            filling.make(n)


def _in_turn(filling: Filling, left: set[int]) -> Iterator[None]:
    """Make what nobody is at, then wait for the others; after each the caller looks at what is ``left``."""
    told = False
    while left:
        before = len(left)
        for n in sorted(left):
            filling.make(n)
            yield
        if len(left) == before:
            if not told:
                print(f"another process is at activations {filling.folder.name}: waiting for it")
            told = True
            time.sleep(0.1)


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """True in the block for who may make ``path``; others are let in when its process has died or was silent for STALE seconds."""
    claim, own = path.with_name(f".claim-{path.stem}"), f"{os.getpid()} {HOST}"
    silent, dead = _owner(claim)
    if dead:
        for half in path.parent.glob(f"{files.WRITING}{path.stem}-*"):
            half.unlink(missing_ok=True)
    if dead or silent > STALE:
        claim.unlink(missing_ok=True)
    try:
        handle = os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        yield False
        return
    over = threading.Event()

    def renew() -> None:
        while not over.wait(RENEWED):
            with suppress(FileNotFoundError):
                os.utime(claim)

    try:
        os.write(handle, own.encode())
        os.close(handle)
        threading.Thread(target=renew, daemon=True).start()
        yield True
    finally:
        over.set()
        if claim.exists() and claim.read_text() in (own, ""):
            claim.unlink(missing_ok=True)


def _owner(claim: Path) -> tuple[float, bool]:
    """How many seconds ago a claim was renewed, and whether it is of a process of this machine that is dead."""
    try:
        pid, _, host = claim.read_text().partition(" ")
        silent = time.time() - claim.stat().st_mtime
    except FileNotFoundError:
        return 0.0, False
    return silent, host == HOST and not psutil.pid_exists(int(pid))
