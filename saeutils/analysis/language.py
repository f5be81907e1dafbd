"""In which language a latent speaks, and about how much: its top texts as plain lists of (token, activation)."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache

import numpy as np

from saeutils.analysis import embeddings
from saeutils.kernels import files

GRANULARITIES = ("token", "synonym", "semantic", "unrelated")
SIGNALS = (
    "same", "spread", "kin", "close", "context", "theme", "before", "after", "bilingual", "meaning", "form", "typical", "ending",
)  # fmt: skip
READ = 8  # of a latent's texts, the strongest: the raters saw eight to ten, weaker ones mislead
ONE = 0.55  # cosine of two words from which they mean the same
AROUND = 8  # tokens on either side of a peak that count as its context
Text = Sequence[tuple[str, float]]
BYTE = re.compile("<0x[0-9A-F]{2}>")  # sentencepiece's
HEAVY = 2  # a kana or kanji says about as much as two Latin letters


@cache
def _bytes() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def pieces(tokens: Sequence[str]) -> tuple[list[str], str]:
    """Tokens as text, one by one and together: blanks restored, byte-level pieces decoded, fragments of a character turned into U+FFFD.

    GPT-2's stand-ins for bytes are letters too (``ãģ¾`` is ま, ``é`` may be é): tokens are read as bytes only where all of
    them together are valid UTF-8 with at least one character of several bytes (broken ones at both ends forgiven).
    """
    values = [[_bytes().get(c) for c in t] for t in tokens]
    flat = [v for token in values for v in token]
    if flat and None not in flat and _multibyte(bytes(flat)):
        return [bytes(v).decode(errors="replace") for v in values], bytes(flat).decode(errors="replace")
    out = []
    for token in tokens:
        if BYTE.fullmatch(token):
            token = chr(int(token[3:-1], 16)) if token < "<0x80" else "\ufffd"
        out.append(token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n"))
    return out, "".join(out)


def _multibyte(raw: bytes) -> bool:
    """Whether bytes are UTF-8 with a character beyond ASCII, but for a broken one at either end."""
    start = next((i for i, b in enumerate(raw[:4]) if b & 0xC0 != 0x80), 4)
    try:
        return len(raw[start:].decode()) < len(raw) - start
    except UnicodeDecodeError as error:
        at = error.start + start
        if error.reason != "unexpected end of data":
            return False
        return len(raw[start:at].decode()) < at - start or len(raw) - at > 1


@cache
def script(char: str) -> str:
    """``ja`` for kana and kanji, ``en`` for Latin letters, ``other`` for letters of other scripts; ``""`` is neutral.

    Digits, punctuation, spaces, symbols and emoji are neutral, and so are full-width Latin letters: their script is Latin,
    but only Japanese text is written with them.
    """
    name = unicodedata.name(char, "")
    if not char.isalpha() or name.startswith("FULLWIDTH"):
        return ""
    if name.startswith("LATIN"):
        return "en"
    return "ja" if any(s in name for s in ("HIRAGANA", "KATAKANA", "CJK", "IDEOGRAPHIC")) else "other"


def language_of(text: str) -> str:
    """The language that most of a string is written in: ``ja``, ``en``, ``other``; ``""`` where nothing tells."""
    letters = Counter(script(c) for c in unicodedata.normalize("NFC", text))
    weights = {"ja": HEAVY * letters["ja"], "en": letters["en"], "other": letters["other"]}
    if best := max(weights.values()):
        return max(weights, key=weights.get) if list(weights.values()).count(best) == 1 else ""
    return "en" if any(unicodedata.name(c, "").startswith("FULLWIDTH LATIN") for c in text) else ""


def require(texts: Sequence[str], expected: str, share: float = 0.8) -> None:
    """Check that texts are of one language, by the first thousand of them.

    Raises:
        ValueError: fewer than ``share`` of them are ``expected``.
    """
    found = Counter(language_of(t[:500]) or "neither" for t in texts[:1000])
    if found[expected] < share * max(1, found.total()):
        mix = ", ".join(f"{language} {n / found.total():.0%}" for language, n in found.most_common())
        raise ValueError(f"the texts should be {expected!r} and are {mix or 'none'}: another column or data set?")


def _peak(text: Text) -> tuple[int, list[str], str] | None:
    """Where a text's largest activation is, its tokens as text, and the language of the peak or, if neutral, of the text.

    None without an activation above zero.
    """
    at = max(range(len(text)), key=lambda i: text[i][1], default=None)
    if at is None or text[at][1] <= 0:
        return None
    shown, whole = pieces([token for token, _ in text])
    return at, shown, language_of(shown[at]) or language_of(whole)


def language_tendency(texts: Sequence[Text] | Sequence[Sequence[Text]], share: float = 0.9) -> str | list[str]:
    """``ja``, ``en`` or ``mixed`` for a latent, from the texts that activate it most (seed 000, section 4.2).

    Each text votes with the language of its peak token, or, where that is neutral (digits, punctuation, spaces, symbols,
    byte fragments), with its own; texts without any letter do not vote. The language with at least ``share`` of the votes
    wins, ``mixed`` where none does (``other`` for further scripts).

    Args:
        texts: one latent's texts, each a list of (token, activation); or a list of latents, for a list of answers.

    Raises:
        ValueError: a latent has no text with a positive activation.
    """
    if nested(texts):
        return [language_tendency(latent, share) for latent in texts]
    votes = Counter(found[2] for text in texts if (found := _peak(text)))
    if not votes:
        raise ValueError("no text with a positive activation: leave latents that never fire out")
    del votes[""]
    total = votes.total()
    return next((language for language, n in votes.items() if n >= share * total), "mixed")


def nested(texts: Sequence) -> bool:
    """Whether this is a list of latents, not one latent's texts: told by the first (token, activation) pair inside."""
    depth, inside = 0, texts
    while isinstance(inside, (list, tuple)) or hasattr(inside, "__array__"):
        inside = next((i for i in inside if isinstance(i, str) or len(i)), "")
        depth += 1
    return depth > 3


def granularity(texts: Sequence[Text] | Sequence[Sequence[Text]] | np.ndarray) -> str | list[str]:
    """``token``, ``synonym``, ``semantic`` or ``unrelated``: what a latent's peaks have in common (seed 000, section 4.2).

    ``token``: the same token; ``synonym``: one meaning (猫, ネコ, cat); ``semantic``: a shared topic, kind or role (猫, 犬);
    ``unrelated``: nothing to be seen. A multinomial logistic regression on :func:`signals`, fitted to hand labels
    (``data/granularity.json``; notebook 04 refits it and reports the agreement on labels it has not seen).

    Args:
        texts: one latent's texts, each a list of (token, activation); or a list of latents, or their :func:`signals`
            [latents, signals], for a list of answers.

    Raises:
        ValueError: a latent has fewer than two texts with a positive activation.
    """
    known = isinstance(texts, np.ndarray)
    if not known and not nested(texts):
        return granularity([texts])[0]
    x, model = texts if known else signals(texts), _model()
    x = (x - np.array(model["mean"])) / np.array(model["scale"])
    scores = x @ np.array(model["weights"]).T + np.array(model["bias"])
    return [model["classes"][i] for i in scores.argmax(1)]


@cache
def _model() -> dict[str, list]:
    return json.loads((files.data_dir() / "granularity.json").read_text())


def signals(latents: Sequence[Sequence[Text]]) -> np.ndarray:
    """What :func:`granularity` decides by, [latents, len(SIGNALS)], from the peaks of a latent's eight strongest texts.

    same: share of the commonest peak token. spread: entropy of peak tokens over its maximum. kin, close: mean and upper
    quartile of the cosines of two peak words with different tokens (1 if there are none). context, theme: mean and ninth
    decile of the cosines of two texts around their peaks (theme: with different peak tokens). before, after: share of the
    peak's commonest neighbour. bilingual: how evenly peaks divide between two languages, 0 … 1. form: share of peaks whose
    token, stem (Porter 2001) or a kanji is that of the most typical peak. meaning: the same, or a cosine of at least .55.
    typical: the largest mean cosine of a peak word with all. ending: share of the commonest last letter. Cosines are those
    of multilingual sentence embeddings, less the mean word and the mean context.

    Raises:
        ValueError: a latent with fewer than two texts that activate it.
    """
    strongest = [sorted(latent, key=lambda text: -max((a for _, a in text), default=0.0))[:READ] for latent in latents]
    peaks = [[_around(*found) for text in latent if (found := _peak(text))] for latent in strongest]
    if short := [i for i, p in enumerate(peaks) if len(p) < 2]:
        raise ValueError(f"latents {short[:5]} have fewer than two texts with a positive activation: give at least two")
    strings = sorted({s for latent in peaks for p in latent for s in (p["word"], p["context"])})
    vectors = dict(zip(strings, embeddings.multilingual(strings).numpy().astype(float)))
    return np.array([_signals(latent, vectors) for latent in peaks])


def _around(at: int, shown: list[str], language: str) -> dict[str, str]:
    """The peak's token, word, neighbours, context and language."""
    plain = [unicodedata.normalize("NFKC", s).casefold().strip() for s in shown]
    return {
        "token": plain[at] or shown[at], "word": _word(shown, at), "before": plain[at - 1] if at else "^",
        "after": plain[at + 1] if at + 1 < len(plain) else "$", "context": "".join(shown[max(0, at - AROUND) : at + AROUND + 1]).strip(),
        "language": language,
    }  # fmt: skip


def _word(shown: Sequence[str], at: int) -> str:
    """The Latin word that the peak token is part of; of Japanese, which has no blanks, the token itself."""
    own = shown[at].strip()
    if not own or any(script(c) != "en" for c in own):
        return own or shown[at]
    start, end = at, at + 1
    while start > 0 and shown[start][:1].strip() and script(shown[start - 1][-1:]) == "en":
        start -= 1
    while end < len(shown) and shown[end][:1].strip() and script(shown[end][:1]) == "en":
        end += 1
    return "".join(shown[start:end]).strip()


def _signals(peaks: list[dict[str, str]], vectors: dict[str, np.ndarray]) -> list[float]:
    n = len(peaks)
    count = Counter(p["token"] for p in peaks)
    shares = np.array(list(count.values())) / n
    words, around = (_cosines([vectors[p[key]] for p in peaks], np.array(_model()[key])) for key in ("word", "context"))
    alike = np.array([[_alike(p, q) for q in peaks] for p in peaks])
    other = np.array([[p["token"] != q["token"] for q in peaks] for p in peaks])
    spoken = Counter(p["language"] for p in peaks if p["language"])
    mean_around = (around.sum() - n) / (n * (n - 1))
    return [
        shares.max(),
        float(-(shares * np.log(shares)).sum() / np.log(n)),
        *((words[other].mean(), np.percentile(words[other], 75)) if other.any() else (1.0, 1.0)),
        mean_around,
        np.percentile(around[other], 90) if other.any() else mean_around,
        *(_commonest([p[side] for p in peaks]) for side in ("before", "after")),
        2 * sorted([0, 0, *spoken.values()])[-2] / max(1, spoken.total()),
        (alike | (words >= ONE)).mean(axis=1).max(),
        alike.mean(axis=1).max(),
        words.mean(axis=1).max(),
        _commonest([p["token"][-1:] for p in peaks]),
    ]


def _commonest(values: Sequence[str]) -> float:
    """Share of the commonest value."""
    return Counter(values).most_common(1)[0][1] / len(values)


def _alike(p: dict[str, str], q: dict[str, str]) -> bool:
    """Two peaks of one form: the same token or stem, or a kanji in common."""
    return p["token"] == q["token"] or _stem(p["word"]) == _stem(q["word"]) or bool(_kanji(p["word"]) & _kanji(q["word"]))


@cache
def _stem(word: str) -> str:
    from nltk.stem.snowball import SnowballStemmer  # late: a quarter of a second

    plain = unicodedata.normalize("NFKC", word).casefold()
    return SnowballStemmer("english").stem(plain) if plain.isascii() else plain


@cache
def _kanji(word: str) -> frozenset[str]:
    return frozenset(c for c in unicodedata.normalize("NFKC", word) if "CJK" in unicodedata.name(c, ""))


def _cosines(vectors: list[np.ndarray], centre: np.ndarray) -> np.ndarray:
    x = np.array(vectors) - centre  # [n, d]
    x /= np.linalg.norm(x, axis=1, keepdims=True).clip(1e-9)
    return x @ x.T
