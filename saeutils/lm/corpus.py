"""What a text must be before an LM runs over it, and the key under which its rows are found again."""

import hashlib
import json

import torch
from datasets import Dataset

from saeutils.lm import models
from saeutils.lm.collector import parse_hook

VERSION = 2  # of the rows: raise it when the same text, LM and options would give others (a golden test notices)


def require(lm: str, text: Dataset) -> None:
    """Raises:
    ValueError: a model where its name is expected, another collection than one ``datasets.Dataset`` with a column ``text``, an
        empty one.
    """
    if not isinstance(lm, str) or not lm.strip():
        raise ValueError(f"lm: give the model's name or folder, not a {type(lm).__name__}: it is loaded as far as the hook")
    if not isinstance(text, Dataset) or "text" not in text.column_names:
        fix = "choose a split, text['train']" if isinstance(text, dict) else "Dataset.from_dict({'text': [...]}) makes one"
        raise ValueError(f"text: a datasets.Dataset with a column 'text' is expected, not {type(text).__name__}: {fix}")
    if not len(text):
        raise ValueError("the text has no documents: give more of it")


def key(lm: str, hook: str, text: Dataset, load: dict, **rest) -> str:
    """A digest of everything that the rows depend on, the model's weights, every text and :data:`VERSION` included."""
    parse_hook(hook)
    digest = hashlib.sha256()
    for document in text["text"]:
        digest.update(document.encode() + b"\0")
    lm = models.identity(lm, load.get("revision"))
    device = load.get("device") or models.default_device()
    load = {**load, "device": torch.device(device).type, "dtype": load.get("dtype") or models.default_dtype(device)}
    parts = [VERSION, lm, hook, {k: str(v) for k, v in load.items()}, rest]
    digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()[:16]
