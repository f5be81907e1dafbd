"""Corpora of two languages that differ in one thing: whether one language can be known from the other, and how.

=============  ==========================================  =================================
arm            a document                                   what tells of the other language
=============  ==========================================  =================================
unrelated      a Japanese and an English sentence           nothing
translations   a Japanese sentence and its translation      translations lie side by side
mirrored       two English sentences, one of them mirrored  the same statistics, word by word
broken         as mirrored, half of the words redrawn       the same, for the other half
=============  ==========================================  =================================
"""

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from saeutils.kernels import files
from saeutils.kernels.door import door, optionally
from saeutils.lm import models, text
from saeutils.worlds import bilingual

VERSION = 1  # raise it when the same arm and seed would give other texts
ARMS = ("unrelated", "translations", "mirrored", "broken")
WORD = re.compile(r"[A-Za-z]+|[0-9]|[^A-Za-z0-9\s]")
BLANK = "▁"  # what a token that begins a word begins with
MIRROR = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}  # printable ASCII → its full-width form


class Corpus(NamedTuple):
    """What an arm's LMs read: ``documents`` of two sentences, one of each language; held-out sentences ``first`` and ``second``,
    which correspond one by one; the tokenizer."""

    documents: list[str]
    first: list[str]
    second: list[str]
    tokenizer: PreTrainedTokenizerFast


def checkpoints(
    arm: str, seed: int, steps: Sequence[int], *, width: int = 128, layers: int = 4, heads: int = 4, batch: int = 64, lr: float = 2e-3,
    words: int = 4_000, held_out: int = 2_000, docs: int | None = None, device: str | None = None,
) -> dict[int, dict[str, str]]:  # fmt: skip
    """An arm's LM at each of ``steps`` of its training: shipped in ``data/arms-lm…``, made before, or trained now.

    Llama-shaped, 1.8M weights at the usual size, batches of 64 rows of 64 tokens; :func:`saeutils.worlds.bilingual.train_lm`
    trains it. ``seed`` gives its first weights, and its :func:`corpus`.

    Returns:
        {step: arguments for :func:`saeutils.lm.models.load_hf`}.

    Raises:
        ValueError: no such arm; a step that a finished run did not keep.
    """
    door(seed=seed, words=words, held_out=held_out, width=width, layers=layers, heads=heads, batch=batch, lr=lr)
    name = f"{arm}-{seed}-{files.key(VERSION, width, layers, heads, batch, lr, words, held_out, docs, max(steps))}"
    folder = files.cache_dir("models", "arms") / name
    for home in (*files.data_dir().glob(f"arms-lm*/{name}"), folder):
        kept = sorted(int(f.name[5:]) for f in home.glob("step-*"))
        if set(kept) >= set(steps):
            return models.checkpoints(str(home), steps)
    if max(steps) in kept:
        missing = sorted(set(steps) - set(kept))
        raise ValueError(f"{folder} is trained, and kept {kept}, not {missing}: ask for those, or delete it to train it again")
    texts = corpus(arm, seed, words=words, held_out=held_out, docs=docs)
    return bilingual.train_lm(
        folder, texts.documents, texts.tokenizer, width=width, layers=layers, heads=heads, context=64, batch=batch,
        steps=steps, lr=lr, seed=seed, device=device,
    )  # fmt: skip


@lru_cache(maxsize=2)  # a process that trains SAEs on one LM's checkpoints asks for the same text again and again
def corpus(arm: str, seed: int, *, words: int = 4_000, held_out: int = 2_000, docs: int | None = None) -> Corpus:
    """Tatoeba's sentences as documents of one arm; pairing, order and what is held out are drawn by ``seed``.

    Args:
        words: vocabulary of either language, in the arms that are made of English alone.
        held_out: so many pairs (of translations: about so many, as pairs that share a sentence stay together).
        docs: only the first so many documents.

    Raises:
        ValueError: no such arm; too few sentences to hold out so many.
    """
    door(seed=seed, words=words, held_out=held_out)
    optionally(docs=docs)
    if arm not in ARMS:
        raise ValueError(f"unknown arm {arm!r}: one of {', '.join(ARMS)}")
    rng = np.random.default_rng(seed)
    if arm in ("mirrored", "broken"):
        known, known_words = english(words)
        if len(known) < 3 * held_out:
            raise ValueError(f"{words} words make up {len(known)} sentences, too few to hold out {held_out}: give more words")
        mixed = [known[i] for i in rng.permutation(len(known))]
        apart, rest = mixed[:held_out], mixed[held_out:]
        half = len(rest) // 2
        first, second = rest[:half], rest[half : 2 * half]
        others = apart
        if arm == "broken":
            second, others = (redrawn(side, known_words[1::2], rng) for side in (second, apart))
        sides = first, [mirror(t) for t in second]
        return Corpus(_documents(*sides, rng)[:docs], apart, [mirror(t) for t in others], word_tokenizer(known_words))
    rest, apart = bilingual.hold_out(text.load_text("tatoeba"), held_out, seed)
    if arm == "unrelated":
        rest["en"] = [rest["en"][i] for i in rng.permutation(len(rest["en"]))]
    tokenizer = AutoTokenizer.from_pretrained(files.data_dir() / "bilingual-lm" / "step-0004000")
    return Corpus(_documents(rest["ja"], rest["en"], rng)[:docs], apart["ja"], apart["en"], tokenizer)


def mirror(sentence: str) -> str:
    """The sentence in the mirrored language: every word is another token, at the same place; shown in full-width letters."""
    return sentence.translate(MIRROR)


def redrawn(sentences: Sequence[str], broken: Sequence[str], rng: np.random.Generator) -> list[str]:
    """Each occurrence of a broken word drawn anew from the law that broken words have in these sentences."""
    flat = [word for sentence in sentences for word in sentence.split()]
    gone = set(broken)
    pool = [word for word in flat if word in gone]
    fresh = iter([pool[i] for i in rng.integers(len(pool), size=len(pool))] if pool else [])
    return [" ".join(next(fresh) if word in gone else word for word in sentence.split()) for sentence in sentences]


@cache
def english(words: int) -> tuple[list[str], list[str]]:
    """Tatoeba's English sentences that the commonest ``words`` words make up, words apart by blanks; and these words, commonest first."""
    split = [WORD.findall(t) for t in dict.fromkeys(text.load_text("tatoeba")["en"][:])]
    counts = Counter(word for sentence in split for word in sentence if word.isascii())
    known = [word for word, _ in counts.most_common(words)]
    inside = set(known)
    return list(dict.fromkeys(" ".join(s) for s in split if inside.issuperset(s))), known


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token a word, words apart by blanks: BOS, the words, and their mirrored forms behind them in the same order."""
    known = [f"{BLANK}{word}" for word in [*words, *map(mirror, words)]]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate([bilingual.BOS, *known])}, unk_token=bilingual.BOS))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    bos = bilingual.BOS
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=bos, pad_token=bos)


def _documents(first: Sequence[str], second: Sequence[str], rng: np.random.Generator) -> list[str]:
    """Sentence i of both sides, in an order decided by a coin."""
    swap = rng.random(len(first)) < 0.5
    return [f"{b} {a}" if turned else f"{a} {b}" for a, b, turned in zip(first, second, swap)]
