"""Arms of bilingual text: what they share, what differs, and that a mirror is a mirror token by token."""

from collections import Counter
from itertools import product
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from saeutils.kernels import files
from saeutils.lm import models
from saeutils.notebook import scales
from saeutils.worlds import arms

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "04_checkpoints.ipynb"

FEW = dict(words=500, held_out=100)


@pytest.fixture(scope="module")
def corpora() -> dict[str, arms.Corpus]:
    return {arm: arms.corpus(arm, 0, **FEW) for arm in arms.ARMS}


def ids(of: arms.Corpus, sentences: list[str]) -> list[list[int]]:
    return of.tokenizer(sentences, add_special_tokens=False)["input_ids"]


def test_a_mirror_is_another_token_at_the_same_place(corpora):
    of = corpora["mirrored"]
    first, second = (np.concatenate(ids(of, side)) for side in (of.first, of.second))
    assert ((second - first) == 500).all() and len(of.tokenizer) == 1001 and first.min() > 0
    sentence = of.first[0]
    assert arms.mirror("Tom's 2 cats .") == "Ｔｏｍ＇ｓ ２ ｃａｔｓ ．" and of.tokenizer.decode(ids(of, [sentence])[0]) == sentence


def test_no_sentence_is_read_on_both_sides_or_held_out(corpora):
    of = corpora["mirrored"]
    back = str.maketrans({wide: code for code, wide in arms.MIRROR.items()})
    plain, mirrored = Counter(), Counter()
    for document in of.documents:
        words = document.split()
        plain[" ".join(w for w in words if w.isascii())] += 1
        mirrored[" ".join(w.translate(back) for w in words if not w.isascii())] += 1
    assert not plain.keys() & mirrored.keys() and not (plain.keys() | mirrored.keys()) & set(of.first)
    starts = np.mean([document[0].isascii() for document in of.documents])
    assert 0.45 < starts < 0.55 and "" not in plain and "" not in mirrored


def test_each_occurrence_of_a_broken_word_is_drawn_anew(corpora):
    of, words = corpora["broken"], arms.english(500)[1]
    broken = {arms.mirror(word) for word in words[1::2]}
    first, second = ([w for t in side for w in t.split()] for side in (of.first, of.second))
    right = {kind: np.mean([arms.mirror(a) == b for a, b in zip(first, second) if (b in broken) == kind]) for kind in (True, False)}
    assert right[False] == 1 and right[True] < 0.05
    rng = np.random.default_rng(0)
    drawn = arms.redrawn(["a b b c", "b a d d"] * 2000, ["b", "d"], rng)
    counts = Counter(word for t in drawn for word in t.split())
    assert counts["a"] == 4000 and counts["c"] == 2000 and abs(counts["b"] - 6000) < 200  # three in five of the broken ones
    assert arms.redrawn(["a c"], ["b"], rng) == ["a c"]


def test_translations_and_unrelated_have_the_same_sentences(corpora):
    one, other = corpora["translations"], corpora["unrelated"]
    assert one.first == other.first and one.second == other.second and one.documents != other.documents
    assert len(one.documents) == len(other.documents)
    letters = [Counter("".join(of.documents)) for of in (one, other)]
    assert letters[0] == letters[1]
    assert arms.corpus("translations", 1, **FEW).first != one.first and len(arms.corpus("unrelated", 0, docs=7, **FEW).documents) == 7


@pytest.mark.parametrize(
    "given, message",
    [
        ((("mirror", 0), {}), "unknown arm 'mirror': one of unrelated, translations, mirrored, broken"),
        ((("mirrored", 0), {"words": 3}), "3 words make up 0 sentences, too few to hold out 2000: give more words"),
        ((("mirrored", -1), {}), "seed=-1: expected a whole number of at least 0"),
        ((("unrelated", 0), {"held_out": 100_000}), "pairs are too few to hold out 100000"),
    ],
)
def test_bad_arguments(given, message):
    with pytest.raises(ValueError, match=message):
        arms.corpus(*given[0], **given[1])


def test_checkpoints_are_trained_once_and_told_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SAEUTILS_CACHE", str(tmp_path))
    small = dict(width=16, layers=1, heads=2, batch=4, docs=200, **FEW)
    found = arms.checkpoints("mirrored", 0, [0, 2], **small)
    model, tokenizer = models.load_hf(**found[2])
    assert model.config.vocab_size == len(tokenizer) == 1001 and model.config.num_hidden_layers == 1
    monkeypatch.setattr(arms, "corpus", None)  # nothing is made again
    assert arms.checkpoints("mirrored", 0, [0, 2], **small) == found
    with pytest.raises(ValueError, match=r"is trained, and kept \[0, 2\], not \[1\]: ask for those, or delete it"):
        arms.checkpoints("mirrored", 0, [0, 1, 2], **small)
    monkeypatch.undo()
    monkeypatch.setenv("SAEUTILS_CACHE", str(tmp_path))
    other = arms.checkpoints("mirrored", 0, [0, 2], **{**small, "width": 32})
    assert other[0]["name"] != found[0]["name"]
    first, second = (models.load_hf(**of)[0].get_input_embeddings().weight for of in (found[0], found[2]))
    assert not torch.equal(first, second)


def test_the_notebook_finds_its_models_shipped(monkeypatch):
    monkeypatch.setattr(arms.bilingual, "train_lm", None)  # calling it would fail
    for variable in ("SAEUTILS_CAP", "SAEUTILS_SEED"):
        monkeypatch.delenv(variable, raising=False)
    cells = [c.source for c in nbformat.read(NOTEBOOK, 4).cells if c.cell_type == "code"]
    own = {"arms": arms, "scales": scales, "SCALE": "laptop"}
    for begins in ("LARGER = ", "S, table_of_scales = ", "shape = "):
        (cell,) = [c for c in cells if c.startswith(begins)]
        exec(cell, own)
    assert own["S"].run == 0 and set(own["steps_of"]) == {"mirrored", "broken"}
    (seeds,) = [line for cell in cells for line in cell.splitlines() if line.startswith("seeds = ")]
    exec(seeds, own | {"numbers": range(own["S"].lms)}, own)
    for arm, seed in product(own["steps_of"], own["seeds"]):
        found = arms.checkpoints(arm, seed, own["steps_of"][arm], **own["shape"])
        assert all(Path(where["name"]).is_relative_to(files.data_dir()) for where in found.values())
    shape = dict(own["S"].side, held_out=own["S"].sentences)
    for arm, i in product(("translations", "unrelated"), range(own["S"].sides)):
        found = arms.checkpoints(arm, own["scales"].seed(10 + i), own["S"].side_steps, **shape)
        assert all(Path(where["name"]).is_relative_to(files.data_dir()) for where in found.values())
