"""What drifts unless a test holds it: layout, style of notebooks, derived parts of README, sizes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from saeutils.kernels import files
from saeutils.lm import archives
from saeutils.notebook import claims, publish, scales

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TOP = {
    "README.md",
    "requirements.txt",
    "pyproject.toml",
    "LICENSE",
    "notebooks",
    "saeutils",
    "tests",
    "data",
    "figures",
}


def test_nothing_else_at_the_top():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    assert {p.split("/")[0] for p in listed if p and not p.startswith(".")} <= TOP


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_committed_as_run(path):
    nb = nbformat.read(path, 4)
    code = [c for c in nb.cells if c.cell_type == "code"]
    counts = [c.execution_count for c in code]
    assert counts == list(range(1, len(code) + 1)), "run it from the first cell to the last, then commit"
    outputs = [o for c in code for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert "widgets" not in nb.metadata, "strip metadata.widgets: GitHub does not render notebooks that carry it"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_style(path):
    nb = nbformat.read(path, 4)
    markdown = [c.source for c in nb.cells if c.cell_type == "markdown"]
    code = [c for c in nb.cells if c.cell_type == "code"]
    assert "colab.research.google.com" in markdown[0] and "# " in markdown[0] and "**Claim.**" in markdown[0]
    assert 'if "google.colab" in sys.modules:' in code[0].source
    assert any("parameters" in c.metadata.get("tags", []) for c in code)
    assert all(len(c.source.splitlines()) <= 40 for c in code), "a cell has more than forty lines"
    titles = re.findall(r"^## (.+)", "\n".join(markdown), flags=re.M)
    for needed in ("Paper and here", "Explore", "Limits"):
        assert any(t.startswith(needed) for t in titles), needed
    assert "if S.scale ==" not in "".join(c.source for c in code)
    assert (ROOT / "figures" / path.stem / "claims.csv").exists()


def test_address_comes_from_one_place():
    for path in NOTEBOOKS:
        assert path.read_text() == publish.notebook_text(path, ROOT), "run: python -m saeutils.notebook.publish"
        assert publish.badge_url(ROOT, path.stem) in path.read_text()
        assert publish.install_line(ROOT) in path.read_text()


def test_changing_the_address_changes_every_link(tmp_path):
    changed = (ROOT / "pyproject.toml").read_text().replace(publish.address(ROOT)[0], "https://github.com/someone/else")
    (tmp_path / "pyproject.toml").write_text(changed)
    for path in NOTEBOOKS:
        text = publish.notebook_text(path, tmp_path)
        assert "someone/else/blob" in text and "git+https://github.com/someone/else@" in text
        assert publish.address(ROOT)[0] not in text


def test_readme_is_up_to_date():
    rerun = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "figures"], cwd=ROOT, capture_output=True)
    if rerun.returncode == 1:  # as README's first command does
        pytest.skip("a notebook was run again here: python -m saeutils.notebook.publish brings its results into README")
    assert (ROOT / "README.md").read_text() == publish.readme_text(ROOT), "run: python -m saeutils.notebook.publish"
    for path in NOTEBOOKS:
        assert path.stem in (ROOT / "README.md").read_text()


def test_claims_have_the_fixed_columns():
    table = claims.all_claims()
    assert set(table["notebook"]) == {p.stem for p in NOTEBOOKS}
    assert list(table.columns) == [*claims.COLUMNS, "notebook"]
    assert set(table["holds"]) <= set(claims.JUDGEMENTS)
    assert set(table["scale"]) <= {"laptop", "colab", "paper"}
    numeric = table[["here", "low", "high"]].apply(pd.to_numeric)
    measured = numeric["here"].notna()
    assert (table.loc[~measured, "holds"] == "not judged").all()  # nothing to compare
    assert ((numeric["low"] <= numeric["here"]) & (numeric["here"] <= numeric["high"]))[measured].all()


def test_sizes():
    for path in (ROOT / "saeutils").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path
    for path in (ROOT / "data").rglob("*.safetensors"):
        if "cache" not in path.parts:
            assert path.stat().st_size <= 25e6, path


def test_archives_are_pinned():
    for name, pin in archives.pinned().items():
        assert re.fullmatch("[0-9a-f]{64}", pin["sha256"]) and pin["size"] > 0 and pin["licence"], name


def test_scales(monkeypatch):
    table = {"smoke": {"a": 1, "tokens": 10}, "laptop": {"tokens": 90}, "paper": {"a": 3}}
    monkeypatch.delenv("SAEUTILS_CAP", raising=False)
    settings, shown = scales.choose("laptop", table)
    assert (settings.a, settings.tokens, settings.scale) == (1, 90, "laptop") and "laptop ← runs" in shown.columns
    monkeypatch.setenv("SAEUTILS_CAP", "tokens=50")
    assert scales.choose("paper", table)[0].tokens == 50 and scales.rehearsal("paper")
    monkeypatch.setenv("SAEUTILS_SCALE", "colab")
    assert scales.current() == "colab"
    with pytest.raises(ValueError, match="unknown scale 'huge': one of"):
        scales.current("huge")


def test_ledger(tmp_path, monkeypatch):
    monkeypatch.setenv("SAEUTILS_CACHE", str(tmp_path))
    ledger = claims.Ledger("x", "smoke")
    ledger.add("c", "s", 1.0, 0.5, low=0.4, high=0.6, holds=True)
    written = pd.read_csv(tmp_path / "rehearsal" / "x" / "claims.csv")
    assert written["holds"].tolist() == ["not judged"]  # smoke never judges
    with pytest.raises(ValueError, match="outside its interval"):
        ledger.add("c", "s", 1.0, 0.7, low=0.4, high=0.6, holds=True)


def test_bootstrap_covers_the_mean():
    import numpy as np

    rng, hits = np.random.default_rng(0), 0
    for i in range(200):
        _, low, high = claims.bootstrap(rng.normal(2.0, 1.0, 40), n=300, seed=i)
        hits += low <= 2.0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_card_of_the_shipped_sae():
    from sae_lens import SAE

    folder = files.data_dir() / "sae-gemma-3-270m-block12"
    sae = SAE.load_from_disk(folder)
    card = json.loads((folder / "card.json").read_text())
    assert sae.cfg.architecture() == "topk" and sae.cfg.d_sae <= 8192 and sae.cfg.d_in == 640
    assert {"tokens", "l0", "fvu", "loss_recovered", "dead"} <= set(card)
    assert card["loss_recovered"] >= 0.95 and card["dead"] <= 0.05


def test_only_what_trains_or_loads_an_sae_imports_saelens():
    light = "archives claims scales text plots metrics matching search steering interventions quality checkpoints"
    heavy = "sorted({'sae_lens', 'transformer_lens', 'transformers'} & set(sys.modules))"
    code = f"import sys; from saeutils import {', '.join(light.split())}; print({heavy})"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out == "[]\n"
