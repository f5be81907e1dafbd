"""Every name of ours that package, notebooks and tests take from a module or room is there: lazy rooms tell only when asked."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = sorted([*(ROOT / "saeutils").rglob("*.py"), *(ROOT / "tests").rglob("*.py")])
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def _source(path: Path) -> str:
    if path.suffix == ".py":
        return path.read_text()
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", "\n".join("".join(c["source"]) for c in cells), flags=re.M)


def _asked(tree: ast.AST) -> set[tuple[str, str]]:
    """(module, name) of every import from ours, and of every attribute taken from a module of ours that is bound to a name."""
    asked, bound = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "saeutils":
            for alias in node.names:
                asked.add((node.module, alias.name))
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    stored |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound.keys() - stored:
            asked.add((bound[node.value.id], node.attr))
    return asked


@pytest.mark.parametrize("path", [*PYTHON, *NOTEBOOKS], ids=lambda p: str(p.relative_to(ROOT)))
def test_names_are_there(path):
    for module, name in _asked(ast.parse(_source(path))):
        try:
            holder = importlib.import_module(module)
        except ModuleNotFoundError:  # a class or function, and an attribute of it
            continue
        if not hasattr(holder, name):
            importlib.import_module(f"{module}.{name}")
