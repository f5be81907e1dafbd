"""One command after the public address, a claim, a time or an archive has changed: ``python -m saeutils.notebook.publish``.

Rewrites what is derived: badge and install cell of every notebook; README's tables of notebooks and of data; ledger and
speed table in ``figures/README.md``.
"""

import json
import re
import tomllib
from pathlib import Path

import pandas as pd

from saeutils.kernels import files
from saeutils.lm import archives
from saeutils.notebook import claims, verdicts

PLACEHOLDER = "https://github.com/OWNER/sae-notebooks"  # no public address yet: no badge, and Colab says what to do
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
INSTALL = """import importlib.util
import sys

if "google.colab" in sys.modules and not importlib.util.find_spec("saeutils"):
    {install}
else:
    sys.path.insert(0, "..")  # the checkout that this notebook lies in
# Colab with Drive mounted: a lost runtime goes on if this line is run
# %env SAEUTILS_CACHE=/content/drive/MyDrive/saeutils
"""
NOWHERE = """raise SystemExit(
        "This copy has no public address yet. Push its folder to GitHub, where a workflow "
        "writes the address into this cell; or run `pip wheel --no-deps .` in it, upload "
        "the wheel and install that."
    )"""


def address(root: Path) -> tuple[str, str]:
    """(repository URL, tag) from pyproject.toml."""
    project = tomllib.loads((root / "pyproject.toml").read_text())
    return project["project"]["urls"]["Repository"].rstrip("/"), project["tool"]["saeutils"]["tag"]


def badge(root: Path, notebook: str) -> str:
    """The badge that opens a notebook in Colab, as Markdown; empty while there is no public address."""
    url, tag = address(root)
    if url == PLACEHOLDER:
        return ""
    opens = f"https://colab.research.google.com/github/{url.removeprefix('https://github.com/')}/blob/{tag}/notebooks"
    return f"[![Open in Colab]({BADGE})]({opens}/{notebook}.ipynb)"


def install_cell(root: Path) -> str:
    """The first code cell of every notebook."""
    url, tag = address(root)
    line = NOWHERE if url == PLACEHOLDER else f'%pip install -q "saeutils @ git+{url}@{tag}"'
    return INSTALL.format(install=line).rstrip("\n")


def notebook_text(path: Path, root: Path) -> str:
    """A notebook's file with badge and install cell brought up to date (sources only; outputs stay)."""
    notebook = json.loads(path.read_text())
    first = notebook["cells"][0]
    lines = [line for line in "".join(first["source"]).split("\n") if BADGE not in line]
    text = "\n".join(lines).lstrip("\n")
    first["source"] = "\n\n".join(filter(None, [badge(root, path.stem), text])).splitlines(keepends=True)
    code = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    code["source"] = install_cell(root).splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def about(path: Path) -> dict[str, str]:
    """What README says of a notebook: ``question``, ``laptop`` and ``colab`` (times), ``finding``.

    Question and times stand in its first cell (``**Question.** …``, else the title; the table of scales), the finding in the
    cell tagged ``finding``.
    """
    cells = json.loads(path.read_text())["cells"]
    first = "".join(cells[0]["source"])
    asked = re.search(r"^\*\*Question\.\*\* (.+)$", first, re.M) or re.search(r"^# \d+ · (.+)$", first, re.M)
    times = {m[1]: m[2].strip() for m in re.finditer(r"^\| \**(\w+)\** \|.*\| ([^|]+) \|$", first, re.M)}
    tagged = ["".join(c["source"]) for c in cells if "finding" in c["metadata"].get("tags", [])]
    found = re.split(r"(?<=[.?!])\s", tagged[0].strip().lstrip("#*_ "))[0] if tagged else ""
    return {"question": asked[1], "finding": found, **{s: times.get(s, "") for s in ("laptop", "colab")}}


def notebooks_table(root: Path) -> str:
    """README's table of notebooks as Markdown."""
    ledger = claims.judged(claims.all_claims())
    lines = ["| | what it asks | what was found | yes / no / cannot tell | laptop | Colab (T4) |", "|---" * 6 + "|"]
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        told, own = about(path), ledger[ledger["notebook"] == path.stem]
        counts = " / ".join(str(int((own["holds"] == kind).sum())) for kind in (verdicts.YES, verdicts.NO, verdicts.CANNOT))
        found = (told["finding"], counts) if len(own) else ("not judged yet", "")
        link = f"[{path.stem[:2]}](notebooks/{path.name})"
        cells = [" ".join(filter(None, [link, badge(root, path.stem)])), told["question"], *found, told["laptop"], told["colab"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ledger_table() -> str:
    """All claims, the verdict of both runs and what each measured, as Markdown."""
    table = claims.judged(claims.all_claims())
    if not len(table):
        return "No notebook has been judged yet."
    lines = ["| | claim | paper | here, a run each | bar | control | holds | why | scale |", "|---" * 9 + "|"]
    for r in table.to_dict("records"):
        control = f"{r['control']:.3g} [{r['control_low']:.3g}, {r['control_high']:.3g}]"
        cells = [r["notebook"][:2], r["claim"], r["paper"], r["both"], r["bar"], control, r["holds"], r["why"], r["scale"]]
        lines.append("| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines)


def data_table() -> str:
    """The pinned archives and their licences as Markdown."""
    lines = ["| archive on PyPI | what | MB | licence |", "|---|---|---|---|"]
    for name, pin in archives.pinned().items():
        lines.append(f"| `{name}` {pin['version']} | {pin['what']} | {pin['size'] / 1e6:.1f} | {pin['licence']} |")
    return "\n".join(lines)


def speed_table() -> str:
    """The last kept benchmarks of each kind of machine (figures/speed) as Markdown: a peer's time over ours, ours over the floor."""
    paths = sorted((claims.root() / "figures" / "speed").glob("speed*.csv"), key=lambda path: path.stem)  # the processor first
    if not paths:
        return "Not measured yet: `SAEUTILS_SPEED=1 pytest tests/benchmarks -s -n0`."
    return "\n\n".join(_machine_table(pd.read_csv(path)) for path in paths)


def _machine_table(runs: pd.DataFrame) -> str:
    runs = runs[runs["section"] != "scaling"]
    shown = ("seconds", "× floor", "× ours", "peak GiB")
    wide = {v: runs.pivot(index=["section", "row"], columns="who", values=v) for v in shown}
    lines = [f"Measured on {', '.join(runs['machine'].unique())}.", "", SPEED_HEAD, "|---" * 6 + "|"]
    for at in runs.drop_duplicates(["section", "row"]).set_index(["section", "row"]).index:
        lines.append("| " + " | ".join(_speed_row(at, *(wide[v].loc[at] for v in shown))) + " |")
    return "\n".join(lines)


SPEED_HEAD = "| | what | ours, ms | × floor | a peer's time over ours | peak GiB: ours, peers |"


def _speed_row(at: tuple[str, str], seconds: pd.Series, floors: pd.Series, over: pd.Series, peak: pd.Series) -> list[str]:
    time, floor, peers = seconds["ours"], floors["ours"], over.drop("ours").dropna()
    ratios = ", ".join(f"{who} {times:.{1 if times >= 1 else 2}f}" for who, times in peers.items())
    used = ", ".join(f"{v:.2f}" for v in peak[["ours", *peers.index]].dropna())
    return [*at, f"{time * 1e3:,.{1 if time < 0.1 else 0}f}", f"{floor:.2f}" if pd.notna(floor) else "", ratios, used]


def _filled(text: str, **parts: str) -> str:
    for name, body in parts.items():
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, b=body: f"{m[1]}{b}\n{m[2]}", text, flags=re.S)
    return text


def derived(root: Path) -> dict[Path, str]:
    """Every file with derived parts → what it should hold.

    Raises:
        ValueError: a ledger is unreadable (nothing has been written then).
    """
    new = {path: notebook_text(path, root) for path in sorted((root / "notebooks").glob("*.ipynb"))}
    readme, figures = root / "README.md", root / "figures" / "README.md"
    new[readme] = _filled(readme.read_text(), notebooks=notebooks_table(root), data=data_table())
    new[figures] = _filled(figures.read_text(), ledger=ledger_table(), speed=speed_table())
    return new


def main() -> None:
    """Rewrite every file whose derived parts have changed."""
    root = claims.root()
    for path, text in derived(root).items():
        if path.read_text() != text:
            with files.whole(path) as tmp:
                tmp.write_text(text)
            print(f"rewrote {path.relative_to(root)}")


if __name__ == "__main__":
    main()
