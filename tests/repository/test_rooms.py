"""The package in rooms: arrows only downwards, small files, documented names, and what a move of files breaks silently."""

import ast
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from sae_lens import registry

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "saeutils"
# the design's table, the highest room first: a row may import from rows below it and from its own room
ROWS = ["notebook", "worlds", "analysis", "steering", "training", "saes", "lm", "kernels", "metrics"]
ROOMS = ROWS[:-1]
FILES = sorted(PACKAGE.rglob("*.py"))


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported(tree: ast.AST) -> set[str]:
    """Every module of ours that code names: import, from-import (also of a module), import_module, wherever it stands."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)}
    return {name for name in found if name.startswith("saeutils.")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    room = _room(path)
    if room == "__init__":
        assert not path.read_text(), "saeutils/__init__.py stays empty"
        return
    assert room in ROWS, f"{room} is no room of the design"
    for name in _imported(ast.parse(path.read_text())):
        assert ROWS.index(name.split(".")[1]) >= ROWS.index(room), f"{path.name} of {room} imports {name} from above"


def test_every_room_has_its_folder_of_tests():
    tests = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and list(p.glob("test_*.py"))}
    assert set(ROOMS) <= tests and (ROOT / "tests" / "test_metrics.py").exists()
    assert not [p.name for p in PACKAGE.iterdir() if p.is_file() and p.name not in ("__init__.py", "metrics.py")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[ast.get_docstring(node) is not None :]
            assert not body or body[-1].end_lineno - body[0].lineno < 50, f"{node.name}: more than fifty lines"


def _handed_on() -> list[tuple[str, str]]:
    rooms = [importlib.import_module(f"saeutils.{room}") for room in ROOMS]
    return [(room.__name__, name) for room in rooms for name in room.__all__]


@pytest.mark.parametrize("room, name", _handed_on())
def test_names_that_rooms_hand_on_are_documented(room, name):
    module = importlib.import_module(room)
    assert not list(Path(module.__file__).parent.glob(f"{name}.py")), "a lazy name beside a module of that name gives the module"
    found = getattr(module, name)
    if not callable(found):
        return
    _documented(found)


def _metrics():
    from saeutils import metrics

    return [f for n, f in vars(metrics).items() if inspect.isfunction(f) and f.__module__ == metrics.__name__ and n[0] != "_"]


@pytest.mark.parametrize("found", _metrics(), ids=lambda f: f.__name__)
def test_measures_are_documented(found):
    _documented(found)


def _documented(found) -> None:
    doc = inspect.getdoc(found) or ""
    assert len(doc.split()) >= 4, "no docstring"
    source = inspect.getsource(found)
    if inspect.isclass(found):
        return
    takes = source.split('"""')[0]
    assert not re.search(r"Tensor|ndarray|Array\b", takes) or "[" in doc or "scalar" in doc, "no shapes of its tensors"
    assert not re.search(r"^\s+raise ", source, re.M) or "Raises" in doc, "its errors are not told"


def test_architectures_are_told_to_saelens_by_one_import(tmp_path):
    """Every folder that these classes write loads in a process that has imported ``saeutils.saes`` and nothing else."""
    known = dict(d_in=8, d_sae=32, device="cpu", dtype="float32")
    own = {
        "sparse_topk": dict(k=4), "sparse_batchtopk": dict(k=4), "sparse_jumprelu": dict(target_l0=4.0), "sparse_standard": {},
        "gba": dict(frequencies=[0.1, 0.01]), "alignsae": dict(slots=["a", "b"], free_k=4),
    }  # fmt: skip
    importlib.import_module("saeutils.saes")
    for name, settings in own.items():
        sae_class, cfg_class = registry.SAE_TRAINING_CLASS_REGISTRY[name]
        sae = sae_class(cfg_class(**known, **settings))
        sae.save_model(tmp_path / f"{name}-training")
        sae.save_inference_model(tmp_path / name)
    read = f"""
import saeutils.saes
from pathlib import Path
from sae_lens import SAE, TrainingSAE
for folder in sorted(Path({str(tmp_path)!r}).iterdir()):
    kind = TrainingSAE if folder.name.endswith("-training") else SAE
    print(folder.name, type(kind.load_from_disk(folder)).__name__)
"""
    out = subprocess.run([sys.executable, "-c", read], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert out.split()[::2] == sorted(p.name for p in tmp_path.iterdir()) and len(out.splitlines()) == 12


@pytest.mark.parametrize("name, heavy", [
    ("saeutils.metrics", "sae_lens transformer_lens transformers scipy.stats pandas sklearn"),
    ("saeutils.notebook.claims", "sae_lens transformer_lens transformers scipy.stats sklearn"),
    ("saeutils.notebook.scales", "torch sae_lens transformers sklearn"),
    ("saeutils.analysis.matching", "sae_lens transformer_lens transformers"),
    ("saeutils.steering.edits", "sae_lens transformer_lens transformers"),
    ("saeutils.analysis.quality", "sae_lens transformer_lens transformers"),
    ("saeutils.analysis.interventions", "sae_lens transformer_lens transformers"),
    ("saeutils.training.checkpoints", "sae_lens transformer_lens transformers"),
    ("saeutils.lm.text", "sae_lens transformer_lens transformers"),
    ("saeutils.notebook.plots", "sae_lens transformer_lens transformers torch"),
])  # fmt: skip
def test_an_import_loads_only_what_it_needs(name, heavy):
    code = f"import sys, {name}; print(sorted(set({heavy.split()!r}) & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out == "[]\n"


def test_a_wheel_has_every_room_and_the_data(tmp_path):
    """Built, installed elsewhere: rooms import, ``data/`` is read, the cache lies outside the installation."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {"saeutils", "saeutils.data"} | {".".join(p.parent.relative_to(ROOT).parts) for p in FILES if p.name == "__init__.py"}
    assert set(listed) == folders
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # of an earlier build: its files would come along
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(tmp_path), str(ROOT)], check=True)
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    (wheel,) = tmp_path.glob("*.whl")
    elsewhere = tmp_path / "elsewhere"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(elsewhere), str(wheel)], check=True)
    code = f"""
import importlib, sys
sys.path.insert(0, {str(elsewhere)!r})
for name in {sorted(folders - {"saeutils.data"})!r}:
    assert importlib.import_module(name).__file__.startswith({str(elsewhere)!r}), name
from saeutils.kernels import files
from saeutils.lm import archives, models
from saeutils.worlds import biographies
from sae_lens import SAE
assert archives.pinned() and biographies.relations() and files.data_dir().parent.name == "saeutils"
assert SAE.load_from_disk(files.data_dir() / "sae-gemma-3-270m-block12").cfg.d_in == 640
assert SAE.load_from_disk(files.data_dir() / "sae-gemma-3-270m-block9").cfg.d_in == 640
assert SAE.load_from_disk(files.data_dir() / "sae-gemma-3-270m-block9-plain").cfg.d_in == 640
assert models.located("bilingual-lm/step-0004000").startswith({str(elsewhere)!r})
print(files.cache_dir())
"""
    env = {k: v for k, v in os.environ.items() if k != "SAEUTILS_CACHE"}
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stderr[-2000:]
    assert out.stdout.strip() == str(Path.home() / ".cache" / "saeutils")


def test_the_checkout_is_found_from_notebooks_and_package():
    code = "import os, json; from saeutils.kernels import files; from saeutils.notebook import claims; print(json.dumps([str(files.data_dir()), str(claims.root())]))"
    for folder in (ROOT, ROOT / "notebooks"):
        out = subprocess.run(
            [sys.executable, "-c", "import sys; sys.path.insert(0, '..' if 'notebooks' in __import__('os').getcwd() else '.')\n" + code],
            cwd=folder, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        data, root = (Path(p).resolve() for p in json.loads(out))
        assert (data, root) == (ROOT / "data", ROOT)
