"""What ``shared/style.md`` asks of a notebook's cells, as functions that return what is wrong, one sentence each."""

import ast
import io
import re
import statistics
import tokenize
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

from nbformat import NotebookNode

COLUMNS, LINES, MEDIAN, HIDDEN = 100, 20, 10, 15
# one or two letters that equations, matplotlib and the field use; every other name is a word
SHORT = set(["x", "y", "z", "h", "f", "g", "n", "m", "d", "k", "i", "j", "t", "p", "r", "s", "a", "b", "c", "e", "u", "v", "w", "q", "W", "U", "V", "B", "F", "L", "S", "N", "K", "X", "Z", "_"]) | {
    "lm", "ax", "l0", "l1", "lr", "df", "id", "no", "ja", "en", "ko", "k1", "np", "pd", "to", "of", "at", "by", "on", "up",
}  # fmt: skip


def code_cells(notebook: NotebookNode) -> list[str]:
    """Sources of code cells that hold code."""
    return [c.source for c in notebook.cells if c.cell_type == "code" and c.source.strip()]


def plain(source: str) -> str:
    """A cell as Python: its magics replaced by ``pass``."""
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M)


def parsed(source: str) -> ast.Module:
    """A cell's syntax tree."""
    return ast.parse(plain(source))


def joined(source: str) -> list[int]:
    """Lines in which a semicolon stands between two statements (one at the end only silences an output)."""
    tokens = list(tokenize.generate_tokens(io.StringIO(plain(source)).readline))
    ends = (tokenize.NEWLINE, tokenize.COMMENT)
    return [t.start[0] for t, after in pairwise(tokens) if t.string == ";" and t.type == tokenize.OP and after.type not in ends]


def of_cell(source: str) -> list[str]:
    """What is wrong with one cell of code."""
    lines, tree = source.splitlines(), parsed(source)
    found = [f"{len(lines)} lines, at most {LINES}"] if len(lines) > LINES else []
    found += [f"{len(line)} columns: {line[:60]}…" for line in lines if len(line) > COLUMNS]
    found += [f"noqa: {line.strip()[:60]}" for line in lines if "noqa" in line]
    found += [f"statements joined in line {line}" for line in joined(source)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Lambda):
            found.append(f"a lambda bound to a name: {ast.unparse(node)[:60]}")
        if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) and len(node.generators) > 1:
            found.append(f"a comprehension with several for: {ast.unparse(node)[:60]}")
        if isinstance(node, ast.JoinedStr) and any(isinstance(inner, ast.IfExp) for inner in ast.walk(node)):
            found.append(f"a conditional in an f-string: {ast.unparse(node)[:60]}")
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and len(node.id) < 3 and node.id not in SHORT:
            found.append(f"a name that is no word: {node.id}")
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "S":
            found.append(f"assigns to the settings: {ast.unparse(node)}")
        if isinstance(node, ast.Compare) and "S.scale" in ast.unparse(node):
            found.append(f"asks for the scale: {ast.unparse(node)[:60]}")
    return found + twice(tree)


def twice(tree: ast.Module) -> list[str]:
    """Statements that do something else when their cell runs a second time: += and append on what another cell made."""
    born, found = set(), []
    for statement in tree.body:
        for node in ast.walk(statement):
            grows = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("append", "extend")
            target = node.func.value if grows else node.target if isinstance(node, ast.AugAssign) else None
            if isinstance(target, ast.Name) and target.id not in born | _born(statement):
                found.append(f"a second run changes {target.id}: {ast.unparse(node)[:60]}")
        born |= _born(statement)
    return found


def _born(statement: ast.stmt) -> set[str]:
    others = [node for node in ast.walk(statement) if not isinstance(node, ast.AugAssign)]
    targets = [t for node in others for t in ast.iter_child_nodes(node) if isinstance(t, ast.Name) and isinstance(t.ctx, ast.Store)]
    return {t.id for t in targets} | {n.arg for n in ast.walk(statement) if isinstance(n, ast.arg)}


def of_notebook(notebook: NotebookNode) -> list[str]:
    """What is wrong with a notebook."""
    cells = code_cells(notebook)
    found = [f"cell {i}: {fault}" for i, source in enumerate(cells, 1) for fault in of_cell(source)]
    sizes = [n for source in cells if (n := len(source.splitlines())) > 2]
    if sizes and statistics.median(sizes) > MEDIAN:
        found.append(f"half of the cells have more than {statistics.median(sizes):g} lines, at most {MEDIAN}")
    prose = [c.source for c in notebook.cells if c.cell_type == "markdown" and sentences(c.source) >= 2]
    if len(prose) < len(cells):
        found.append(f"{len(prose)} cells of two sentences or more for {len(cells)} cells of code")
    first = notebook.cells[0].source
    found += [f"the first cell lacks {part}" for part in ("# ", "**Question.**", "| scale |") if part not in first]
    for tag in ("parameters", "finding"):
        if sum(tag in c.metadata.get("tags", []) for c in notebook.cells) != 1:
            found.append(f"not exactly one cell is tagged {tag}")
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    titles = re.findall(r"^## (.+)", text, flags=re.M)
    found += [f"no section {part}" for part in ("Explore", "Limits") if not any(t.startswith(part) for t in titles)]
    if 2 * sum(t.rstrip("* ").endswith("?") for t in titles) < len(titles):
        found.append("fewer than half of the headings are questions")
    return found


def sentences(text: str) -> int:
    """Sentences of a cell of prose; headings, tables and code do not count."""
    plain = re.sub(r"```.*?```", "", text, flags=re.S)
    lines = [line for line in plain.splitlines() if not re.match(r"\s*(#|\||\[!\[|<)", line)]
    return len(re.findall(r"[.?!:。](?=\s|$|\*|\)|”)", "\n".join(lines)))


def hidden(package: Path, notebooks: dict[str, list[str]]) -> dict[str, str]:
    """Package functions over 15 lines that one notebook alone calls: dotted name → notebook.

    ``notebooks``: name → sources of its cells.
    """
    defined, by_package = {}, Counter()
    for path in sorted(package.rglob("*.py")):
        tree, module = ast.parse(path.read_text()), ".".join(path.relative_to(package).with_suffix("").parts)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name[0] != "_":
                body = node.body[ast.get_docstring(node) is not None :]
                defined[f"{module}.{node.name}"] = body[-1].end_lineno - body[0].lineno + 1 if body else 0
        by_package.update(node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute))
        by_package.update(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
    users = defaultdict(set)
    for name, cells in notebooks.items():
        words = {n.attr for c in cells for n in ast.walk(parsed(c)) if isinstance(n, ast.Attribute)}
        words |= {n.id for c in cells for n in ast.walk(parsed(c)) if isinstance(n, ast.Name)}
        for function in defined:
            if function.rsplit(".", 1)[1] in words:
                users[function].add(name)
    alone = {f: next(iter(by)) for f, by in users.items() if len(by) == 1 and defined[f] > HIDDEN}
    return {f: by for f, by in alone.items() if not by_package[f.rsplit(".", 1)[1]]}
