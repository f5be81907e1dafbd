"""Where data and cache lie; files that are there whole or not at all; locks and keys."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from filelock import FileLock, Timeout

WRITING = ".writing-"  # what names of temporary files and folders begin with
PACKAGE = Path(__file__).resolve().parents[1]  # saeutils/, wherever it is installed


def data_dir() -> Path:
    """The repository's ``data/`` folder, or its installed copy inside the package."""
    installed = PACKAGE / "data"
    return installed if installed.is_dir() else PACKAGE.parent / "data"


def cache_dir(*parts: str) -> Path:
    """A folder for what can be rebuilt: ``$SAEUTILS_CACHE``, else ``data/cache`` in a checkout, else ``~/.cache/saeutils``."""
    if root := os.environ.get("SAEUTILS_CACHE"):
        base = Path(root)
    elif (PACKAGE.parent / "pyproject.toml").exists():
        base = data_dir() / "cache"
    else:
        base = Path.home() / ".cache" / "saeutils"
    folder = base.joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal; read again only when its size or time has changed."""
    path = Path(path)
    known = path.stat()
    return _sha256(path, known.st_size, known.st_mtime_ns, known.st_ino)


@lru_cache(4096)
def _sha256(path: Path, *_known: int) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def key(*parts: object) -> str:
    """Sixteen hexadecimal digits that stand for all of ``parts``, whatever the order of a dict's entries."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def lock(*parts: object) -> Iterator[None]:
    """What ``parts`` name is made by one process of this machine at a time; who waits is told so, a dead one holds nothing."""
    own = FileLock(cache_dir("locks") / f"{key(*parts)}.lock")
    try:
        own.acquire(timeout=0.2)
    except Timeout:
        print(f"another process is at {' '.join(map(str, parts))}: waiting for it")
        own.acquire()
    try:
        yield
    finally:
        own.release()


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A temporary file beside ``path``, of this process's own, to be written in the block; renamed to ``path`` at its end.

    After an exception ``path`` is what it was, and the temporary file is gone. Its suffix is that of ``path``.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{WRITING}{path.stem}-", suffix=path.suffix)
    os.close(handle)
    tmp = Path(name)
    try:
        yield tmp
        tmp.chmod(0o666 & ~_umask())  # mkstemp gives it to its owner alone
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path, again: bool = False) -> Iterator[Path | None]:
    """A temporary folder beside ``folder`` to be filled in the block and renamed to it at its end; None where it is there already.

    ``again``: one that is there is replaced, at the end. After an exception all is as before. Only for who holds a lock: what a
    killed process left behind is removed first.
    """
    if folder.exists() and not again:
        yield None
        return
    tmp = folder.with_name(WRITING + folder.name)
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        yield tmp
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written in ``folder``, and nothing else. Only for who holds its lock."""
    for left in folder.glob(f"{WRITING}*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def read_json(path: Path, then: str = "") -> dict:
    """What a JSON file holds; nothing where there is none, or where a disk has truncated it, which is said, and what happens ``then``."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        print(f"{path} is damaged{then and ': '}{then}")
        return {}


def seal(folder: Path, version: int = 1) -> None:
    """Write down the SHA-256 of every file of a folder, in ``sha256.json`` there."""
    hashes = {f.name: sha256_of(f) for f in sorted(folder.iterdir())}
    (folder / "sha256.json").write_text(json.dumps({"version": version, **hashes}))


def sealed(folder: Path, version: int = 1) -> bool:
    """Are all files what :func:`seal` wrote down of them, in this version?"""
    hashes = read_json(folder / "sha256.json")
    if hashes.pop("version", 1) != version or not hashes:
        return False
    return all((folder / f).exists() and sha256_of(folder / f) == h for f, h in hashes.items())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
