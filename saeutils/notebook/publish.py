"""One command after the public address, a claim or an archive has changed: ``python -m saeutils.notebook.publish``.

Rewrites what is derived: badges and install lines of every notebook and README, README's tables of results and of data.
"""

import json
import re
import tomllib
from pathlib import Path

import pandas as pd

from saeutils.lm import archives
from saeutils.notebook import claims

INSTALL = re.compile(r"saeutils @ git\+\S+?(?=[\"'\s])")
BADGE = re.compile(r"https://colab\.research\.google\.com/github/\S+?\.ipynb")


def address(root: Path) -> tuple[str, str]:
    """(repository URL, tag) from pyproject.toml."""
    project = tomllib.loads((root / "pyproject.toml").read_text())
    return project["project"]["urls"]["Repository"].rstrip("/"), project["tool"]["saeutils"]["tag"]


def badge_url(root: Path, notebook: str) -> str:
    """Where Colab opens a notebook."""
    url, tag = address(root)
    return f"https://colab.research.google.com/github/{url.removeprefix('https://github.com/')}/blob/{tag}/notebooks/{notebook}.ipynb"


def install_line(root: Path) -> str:
    """What pip installs on Colab."""
    url, tag = address(root)
    return f"saeutils @ git+{url}@{tag}"


def _relink(text: str, root: Path) -> str:
    def badge(match: re.Match) -> str:
        return badge_url(root, match[0].rsplit("/", 1)[1].removesuffix(".ipynb"))

    return INSTALL.sub(install_line(root), BADGE.sub(badge, text))


def notebook_text(path: Path, root: Path) -> str:
    """A notebook's file with its address brought up to date (sources only; outputs stay)."""
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        cell["source"] = _relink("".join(cell["source"]), root).splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def results_table() -> str:
    """The ledger of claims as Markdown."""
    table = claims.all_claims()
    lines = [
        "| notebook | claim | paper | here (interval) | control | holds | scale |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in table.to_dict("records"):
        here = "–" if str(r["here"]) in ("nan", "") else f"{r['here']} ({r['low']} … {r['high']})"
        cells = [r["notebook"][:2], r["claim"], r["paper"], here, r["control"], r["holds"], r["scale"]]
        lines.append("| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines)


def data_table() -> str:
    """The pinned archives and their licences as Markdown."""
    lines = ["| archive on PyPI | what | MB | licence |", "|---|---|---|---|"]
    for name, pin in archives.pinned().items():
        lines.append(f"| `{name}` {pin['version']} | {pin['what']} | {pin['size'] / 1e6:.1f} | {pin['licence']} |")
    return "\n".join(lines)


def speed_table() -> str:
    """The last kept run of the benchmarks (figures/speed) as Markdown: times a peer takes over ours, ours over the floor."""
    path = claims.root() / "figures" / "speed" / "speed.csv"
    if not path.exists():
        return "Not measured yet: `SAEUTILS_SPEED=1 pytest tests/benchmarks -s`."
    runs = pd.read_csv(path)
    runs = runs[runs["section"] != "scaling"]
    seconds, floors, over, peak = (
        runs.pivot(index=["section", "row"], columns="who", values=v)
        for v in ("seconds", "× floor", "× ours", "peak GiB")
    )
    machines = ", ".join(runs["machine"].unique())
    lines = [
        f"Measured on {machines}.",
        "",
        "| | what | ours, ms | × floor | a peer's time over ours | peak GiB: ours, peers |",
        "|---" * 6 + "|",
    ]
    for at in runs.drop_duplicates(["section", "row"]).set_index(["section", "row"]).index:
        time, floor = seconds.loc[at, "ours"], floors.loc[at, "ours"]
        peers = over.loc[at].drop("ours").dropna()
        ratios = ", ".join(f"{who} {times:.{1 if times >= 1 else 2}f}" for who, times in peers.items())
        used = ", ".join(f"{v:.2f}" for v in peak.loc[at, ["ours", *peers.index]].dropna())
        cells = (
            *at,
            f"{time * 1e3:,.{1 if time < 0.1 else 0}f}",
            f"{floor:.2f}" if pd.notna(floor) else "",
            ratios,
            used,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def readme_text(root: Path) -> str:
    """README with its generated parts and its address brought up to date."""
    text = (root / "README.md").read_text()
    for name, body in (("results", results_table()), ("data", data_table()), ("speed", speed_table())):
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, b=body: f"{m[1]}{b}\n{m[2]}", text, flags=re.S
        )
    return _relink(text, root)


def main() -> None:
    """Rewrite every file whose derived parts have changed."""
    root = claims.root()
    new = {path: notebook_text(path, root) for path in sorted((root / "notebooks").glob("*.ipynb"))}
    new[root / "README.md"] = readme_text(root)
    for path, text in new.items():
        if path.read_text() != text:
            path.write_text(text)
            print(f"rewrote {path.relative_to(root)}")


if __name__ == "__main__":
    main()
