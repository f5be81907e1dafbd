"""What is derived: nothing to rewrite in the commit, one address, tables out of notebooks and ledgers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from saeutils.notebook import claims, publish

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ADDRESS = "https://github.com/someone/else"


def test_nothing_is_to_be_rewritten():
    for path, text in publish.derived(ROOT).items():
        assert path.read_text() == text, f"{path.name}: run python -m saeutils.notebook.publish"


@pytest.fixture
def copy(tmp_path):
    """A checkout with all that is derived, at another address."""
    for name in ("notebooks", "figures", "README.md", "pyproject.toml"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    project = tmp_path / "pyproject.toml"
    project.write_text(project.read_text().replace(publish.address(ROOT)[0], ADDRESS))
    return tmp_path


def test_an_address_changes_every_badge_and_install_line(copy):
    for path in NOTEBOOKS:
        text = publish.notebook_text(copy / "notebooks" / path.name, copy)
        assert f"someone/else/blob/main/notebooks/{path.name}" in text and f"git+{ADDRESS}@main" in text
        assert "no public address" not in text and publish.PLACEHOLDER not in text
        nb = nbformat.reads(text, 4)
        assert nb.cells[0].source.count(publish.BADGE) == 1


@pytest.fixture
def nowhere(tmp_path):
    """A checkout whose address is not known yet."""
    project = (ROOT / "pyproject.toml").read_text().replace(publish.address(ROOT)[0], publish.PLACEHOLDER)
    (tmp_path / "pyproject.toml").write_text(project)
    return tmp_path


def test_no_dead_badge_while_there_is_no_address(nowhere):
    for path in NOTEBOOKS:
        text = publish.notebook_text(path, nowhere)
        assert publish.BADGE not in text and "This copy has no public address yet" in text
        assert (publish.BADGE in path.read_text()) == (publish.address(ROOT)[0] != publish.PLACEHOLDER)


def test_the_install_cell_says_what_to_do_in_colab(nowhere):
    code = f"""
import importlib.util, sys, types
sys.modules['google.colab'] = types.ModuleType('google.colab')
importlib.util.find_spec = lambda name: None  # not installed
{publish.install_cell(nowhere)}"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 1 and out.stderr.startswith("This copy has no public address yet. Push its folder to GitHub")


def _git(*arguments, cwd):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", *identity, *arguments], cwd=cwd, check=True, capture_output=True, text=True).stdout


def test_the_first_push_to_a_repository_of_another_name_rewrites_the_address(copy, tmp_path_factory):
    """The workflow's script, run in clones of two bare repositories of other names, one after the other."""
    for name in ("someone/else", "a-lab/sae"):
        bare, clone = tmp_path_factory.mktemp("remote") / f"{name.split('/')[1]}.git", tmp_path_factory.mktemp("clone") / "work"
        _git("init", "-q", "--bare", "-b", "main", str(bare), cwd=copy)
        _git("clone", "-q", str(bare), str(clone), cwd=copy)
        for part in ("README.md", "pyproject.toml", "notebooks", "figures", "saeutils", ".github"):
            (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, clone / part)
        shutil.copytree(ROOT / "data", clone / "data", ignore=shutil.ignore_patterns("cache", "*.safetensors"))
        _git("checkout", "-q", "-b", "main", cwd=clone)
        _git("add", "-A", cwd=clone)
        _git("commit", "-qm", "first", cwd=clone)
        _git("push", "-q", "origin", "main", cwd=clone)
        env = {**os.environ, "PYTHON": sys.executable, "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b"}
        for said in (f"address is now https://github.com/{name}", "nothing to do"):
            out = subprocess.run(["bash", ".github/address.sh", name], cwd=clone, env=env, capture_output=True, text=True)
            assert out.returncode == 0, out.stderr
            assert said in out.stdout
        assert publish.address(clone)[0] == f"https://github.com/{name}"
        assert f"github/{name}/blob/main" in _git("show", "main:README.md", cwd=bare)
        assert f"git+https://github.com/{name}@main" in _git("show", "main:notebooks/01_emotion_features_and_steering.ipynb", cwd=bare)
        assert len(_git("log", "--format=%h", "main", cwd=bare).split()) == 2


CELLS = [
    ("markdown", "# 09 · Side by side\n\n**Question.** Which method keeps most? Of all.\n\n| scale | machine | time |\n|---|---|---|\n"
     "| **laptop** | 2 cores | 7 min |\n| colab | T4 | 30 min |\n", []),
    ("markdown", "**TopK keeps most. The rest follows.**", ["finding"]),
    ("code", "import sys", []),
]  # fmt: skip


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """A checkout with one notebook judged in two runs."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    made = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}
    nb = nbformat.v4.new_notebook(cells=[made[kind](text, metadata={"tags": tags}) for kind, text, tags in CELLS])
    nbformat.write(nb, tmp_path / "notebooks" / "09_side.ipynb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAEUTILS_KEEP", "1")
    for run, values in (("0", [0.9, 0.8, 0.85]), ("1", [0.8, 0.9, 0.88])):
        monkeypatch.setenv("SAEUTILS_SEED", run)
        ledger = claims.Ledger("09_side", "laptop")
        said = dict(source="s", paper="p|q", control=[0.1, 0.2, 0.3])
        ledger.judge("it holds", values=values, bar=claims.at_least(0.5), **said)
        ledger.judge("it crosses", values=[0.1, 0.9, 0.4 + float(run)], bar=claims.at_least(0.5), **said)
    return tmp_path


def test_tables_come_from_notebooks_and_ledgers(judged):
    row = publish.notebooks_table(judged).splitlines()[2]
    assert row == "| [09](notebooks/09_side.ipynb) | Which method keeps most? Of all. | TopK keeps most. | 1 / 0 / 1 | 7 min | 30 min |"
    ledger = publish.ledger_table()
    assert "| 09 | it holds | p\\|q | 0.85 [" in ledger and "at least 0.5 | 0.2 [" in ledger and "| yes | 3 units" in ledger


def test_every_kind_of_machine_has_a_speed_table_of_its_own(judged):
    assert "Not measured yet" in publish.speed_table()
    folder = judged / "figures" / "speed"
    folder.mkdir(parents=True)
    for name, machine, seconds in (("speed", "a laptop", 0.5), ("speed-gpu", "a card", 0.002)):
        rows = [dict(section="step", row="TopK", who=who, seconds=seconds * n, machine=machine) for n, who in ((1, "ours"), (3, "SAELens"))]
        table = pd.DataFrame(rows).assign(**{"peak GiB": 0.5, "× floor": 1.25, "× ours": [1.0, 3.0]})
        table.to_csv(folder / f"{name}.csv", index=False)
    laptop, card = publish.speed_table().split("\n\nMeasured on a card.\n")
    assert "Measured on a laptop." in laptop and "| step | TopK | 500 | 1.25 | SAELens 3.0 | 0.50, 0.50 |" in laptop
    assert "| step | TopK | 2.0 | 1.25 | SAELens 3.0 |" in card


def test_a_notebook_without_claims_is_shown_without_counts():
    table = publish.notebooks_table(ROOT)
    for path in NOTEBOOKS:
        own = claims.all_claims()["notebook"] == path.stem
        (row,) = [line for line in table.splitlines() if path.name in line]
        assert own.any() or "| not judged yet |  |" in row
        assert json.loads(path.read_text()) and row.count("|") == 7


def test_an_unreadable_ledger_stops_publishing_before_it_writes(judged):
    (judged / "README.md").write_text("<!-- notebooks -->\n<!-- /notebooks -->\n<!-- data -->\n<!-- /data -->\n")
    (judged / "figures" / "README.md").write_text("<!-- ledger -->\n<!-- /ledger -->\n<!-- speed -->\n<!-- /speed -->\n")
    (judged / "figures" / "09_side" / "claims.csv").write_text("nonsense")
    with pytest.raises(ValueError, match=r"09_side/claims.csv is no ledger"):
        publish.main()
    assert "09" not in (judged / "README.md").read_text()
