"""How notebooks read: ``style.py`` over each."""

from pathlib import Path

import nbformat
import pytest
import style

ROOT = Path(__file__).parents[2]
NOTEBOOKS = {p.stem: nbformat.read(p, 4) for p in sorted((ROOT / "notebooks").glob("*.ipynb"))}
# package functions of more than fifteen lines that one notebook alone calls → why they are not in its cells
PLUMBING = {
    "notebook.widgets.labels.label_panel": "a widget",
    "analysis.interventions.disentanglement": "one of SAEBench's eight measures; any SAE can be given to it",
    "analysis.quality.tpp": "one of SAEBench's eight measures; any SAE can be given to it",
    "worlds.biographies.population": "draws names and values: bookkeeping of the made-up world",
    "worlds.biographies.memorise": "the LM's batches and its cache: no part of the method",
}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_committed_as_run(name):
    nb = NOTEBOOKS[name]
    code = [c for c in nb.cells if c.cell_type == "code"]
    counts = [c.execution_count for c in code]
    assert counts == list(range(1, len(code) + 1)), "run it from the first cell to the last, then commit"
    outputs = [o for c in code for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert "widgets" not in nb.metadata, "strip metadata.widgets: GitHub does not render notebooks that carry it"
    assert any("parameters" in c.metadata.get("tags", []) for c in code)
    assert (ROOT / "figures" / name / "claims.csv").exists()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_reads_well(name):
    assert not style.of_notebook(NOTEBOOKS[name])


def test_plumbing_is_not_moved_out_of_sight():
    found = style.hidden(ROOT / "saeutils", {n: style.code_cells(nb) for n, nb in NOTEBOOKS.items()})
    assert set(found) == set(PLUMBING), "functions over fifteen lines that one notebook alone calls: show them in its cells"


@pytest.mark.parametrize("cell, fault", [
    ("x = 1\n" * 21, "21 lines, at most 20"),
    (f"total = {'1 + ' * 30}1", "columns"),
    ("import os  # noqa", "noqa"),
    ("size = 1; width = 2", "statements joined"),
    ("if True: size = 1; width = 2", "statements joined"),
    ("double = lambda x: 2 * x", "a lambda bound to a name"),
    ("pairs = [(i, j) for i in x for j in x]", "a comprehension with several for"),
    ("print(f'{1 if x else 2}')", "a conditional in an f-string"),
    ("sr = 3", "a name that is no word: sr"),
    ("S.steps = 3", "assigns to the settings"),
    ("if S.scale == 'smoke':\n    pass", "asks for the scale"),
    ("total += 1", "a second run changes total"),
    ("for x in range(3):\n    rows.append(x)", "a second run changes rows"),
])  # fmt: skip
def test_the_checker_finds(cell, fault):
    assert any(fault in found for found in style.of_cell(cell)), style.of_cell(cell)


@pytest.mark.parametrize("cell", [
    "%pip install -q thing\nrows = []\nfor x in range(3):\n    rows.append(x)",
    "key = sorted(names, key=lambda name: name[1])",
    "label = f'{width:.2f}'\nif width: print(label)",
    "total = 0\ntotal += 1",
    "with torch.no_grad():\n    z = sae.encode(x)",
])  # fmt: skip
def test_the_checker_lets_pass(cell):
    assert not style.of_cell(cell)


def _notebook(*cells):
    made = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}
    return nbformat.v4.new_notebook(cells=[made[kind](text, metadata={"tags": tags}) for kind, text, *tags in cells])


def test_the_checker_reads_a_whole_notebook():
    good = _notebook(
        ("markdown", "# 02 · Title\n\n**Question.** Does it work? We try it on rows.\n\n| scale | time |\n|---|---|\n"),
        ("code", "SCALE = 'auto'", "parameters"),
        ("markdown", "## Does it work?\n\nWe train one. You would expect it to."),
        ("code", "train()"),
        ("markdown", "It does. The error falls.", "finding"),
        ("markdown", "## Would it work again?\n\nYes. It would."),
        ("markdown", "## Explore\n"),
        ("markdown", "## Limits\n\nOne LM. One text."),
    )
    assert style.of_notebook(good) == ["fewer than half of the headings are questions"] or not style.of_notebook(good)
    bad = _notebook(("markdown", "# Title"), ("code", "x = 1\n" * 11), ("code", "x = 1\n" * 12))
    faults = " ".join(style.of_notebook(bad))
    for part in ("lacks **Question.**", "more than 11.5 lines", "0 cells of two sentences", "tagged finding", "no section Limits"):
        assert part in faults, part


def test_hidden_plumbing_is_found(tmp_path):
    (tmp_path / "room.py").write_text("def long(x):\n" + "    x += 1\n" * 16 + "    return x\n\n\ndef short(x):\n    return x\n")
    cells = {"01": ["room.long(1)\nroom.short(2)"], "02": ["room.short(1)"]}
    assert style.hidden(tmp_path, cells) == {"room.long": "01"}
    assert style.hidden(tmp_path, {**cells, "02": ["room.long(3)"]}) == {}
