"""Where data and cache lie, and files that are there whole or not at all."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def key(*parts: object) -> str:
    """Sixteen hexadecimal digits that stand for all of ``parts``, whatever the order of a dict's entries."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A temporary file beside ``path``, of this process's own, to be written in the block; renamed to ``path`` at its end.

    After an exception ``path`` is what it was, and the temporary file is gone. Its suffix is that of ``path``.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    tmp = Path(name)
    try:
        yield tmp
        tmp.chmod(0o666 & ~_umask())  # mkstemp gives it to its owner alone
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
