"""What arguments must be, one rule a name: a public function checks its own in one line, before work starts.

    door(steps=steps, lr=lr, texts=texts)

raises ValueError with the argument's name, what came, and what is expected. One name means one thing in all rooms, so the rule
belongs to the name. Where a rule depends on other arguments (a latent of this SAE), the function says so itself.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path

import numpy as np

Rule = tuple[str, Callable[[object], bool]]  # what is expected, and whether a value is that


def _tensor(v: object) -> bool:
    torch = sys.modules.get("torch")  # not imported for this: what has not been loaded has made no tensor
    return torch is not None and isinstance(v, torch.Tensor)


def _number(v: object) -> bool:
    if _tensor(v) and not v.ndim:
        v = v.item()
    return isinstance(v, (Real, np.number)) and not isinstance(v, (bool, np.bool_)) and math.isfinite(v)


def _whole(v: object) -> bool:
    return isinstance(v, (Integral, np.integer)) and not isinstance(v, bool)


def whole(least: int) -> Rule:
    """A whole number of at least ``least``."""
    return f"a whole number of at least {least}", lambda v: _whole(v) and v >= least


def number(above: float = -math.inf, below: float = math.inf, least: bool = False) -> Rule:
    """A finite number between two, ``least``: the lower one is allowed."""
    bounds = [f"{'at least' if least else 'above'} {above:g}"] * (above > -math.inf) + [f"below {below:g}"] * (below < math.inf)
    said = " ".join(["a finite number", " and ".join(bounds)]).strip()
    return said, lambda v: _number(v) and (above < v or (least and above == v)) and v < below


def _finite(v) -> bool:
    return bool(v.isfinite().all() if _tensor(v) else np.isfinite(v).all())


def _array(*ndim: int) -> Callable[[object], bool]:
    return lambda v: (_tensor(v) or isinstance(v, np.ndarray)) and v.ndim in ndim and len(v) > 0 and _finite(v)


def _texts(v: object) -> bool:
    return not isinstance(v, str) and isinstance(v, (Sequence, np.ndarray)) and len(v) > 0 and all(isinstance(t, str) for t in v)


def _has(*names: str) -> Callable[[object], bool]:
    return lambda v: all(hasattr(v, name) for name in names)


COUNT, SEED = whole(1), whole(0)
MATRIX = "a matrix [n, d] of finite numbers with at least one row", _array(2)
TEXTS = "a list of texts, at least one", _texts
SAE = "an SAE of SAELens", _has("cfg", "encode", "W_dec")
RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("batch_size", "batch", "batch_tokens", "tokens", "samples", "steps", "iterations", "n_docs", "width", "layers", "heads", "n", "k", "rounds", "neighbours",
         "max_k", "n_pairs", "groups", "d_sae", "held_out", "version", "dead_window", "dead_every", "log_every", "checkpoint_every", "every", "buffer", "n_tokens",
         "max_docs", "free_k", "workers", "docs", "words"), COUNT,
    ),
    **dict.fromkeys(("seed", "token", "layer", "start", "answers", "dense_below", "median_rows", "warm_up", "decay", "i", "skip"), SEED),
    **dict.fromkeys(("lr", "unit", "tolerance", "l0", "highest", "lowest", "scale", "target_l0", "l1", "gain"), number(0)),
    **dict.fromkeys(("strength", "value", "factor", "jump", "bar", "low", "high"), number()),
    **dict.fromkeys(("temperature", "damage", "aux_k", "down", "up", "silent", "bind", "decorrelate"), number(0, least=True)),
    **dict.fromkeys(("share", "rate", "min_f1", "dead_threshold"), number(0, 1)),
    "unseen": number(0, 1, least=True),
    "dead_until": ("a number above 0, at most 1", lambda v: _number(v) and 0 < v <= 1),
    "outlier": number(1),
    "context": whole(2),
    **dict.fromkeys(("x", "W_dec", "z", "h", "heldout"), MATRIX),
    **dict.fromkeys(("direction", "directions"), ("a direction [d], or several [n, d], of finite numbers", _array(1, 2))),
    "ids": ("token ids [batch, position]", lambda v: _tensor(v) and v.ndim == 2 and v.numel() > 0 and not v.is_floating_point()),
    **dict.fromkeys(("texts", "prompts", "slots", "names"), TEXTS),
    **dict.fromkeys(("prompt", "hook", "name", "run", "notebook"), ("a text that is not empty", lambda v: isinstance(v, str) and bool(v.strip()))),
    **dict.fromkeys(("sae", "a", "b"), SAE),
    "saes": ("SAEs, at least one", lambda v: isinstance(v, (Sequence, Mapping)) and len(v) > 0 and all(SAE[1](s) for s in (v.values() if isinstance(v, Mapping) else v))),
    "lm": ("a TransformerBridge (models.load_lm makes one)", _has("hook_dict", "tokenizer", "original_model")),
    "tokenizer": ("a tokenizer", _has("decode", "convert_ids_to_tokens")),
    "acts": ("what activations.collect gives", _has("meta", "batches", "all")),
    "table": ("what features.latent_table gives", _has("acts", "doc", "n_docs")),
    **dict.fromkeys(("change", "decoder", "work"), ("a function", callable)),
    **dict.fromkeys(("path", "folder", "source"), ("a path", lambda v: isinstance(v, (str, Path)) and bool(str(v).strip()))),
    "jobs": ("names and what they stand for, at least one", lambda v: isinstance(v, Mapping) and len(v) > 0),
    "fractions": ("three shares, of train, validation and test, that add up to 1", lambda v: isinstance(v, (tuple, list)) and len(v) == 3 and min(v) >= 0 and abs(sum(v) - 1) < 1e-6),
    "stages": ("the steps of both stages, two whole numbers of which one may be 0", lambda v: isinstance(v, (tuple, list)) and len(v) == 2 and all(_whole(n) and n >= 0 for n in v) and sum(v) > 0),
    "betas": ("two numbers from 0 to below 1", lambda v: isinstance(v, Sequence) and len(v) == 2 and all(_number(b) and 0 <= b < 1 for b in v)),
    "matched": ("what matching.compare gives", lambda v: hasattr(v, "columns") and {"decoder", "encoder", "same"} <= set(v)),
}  # fmt: skip


def door(**given: object) -> None:
    """Each argument is what its name says.

    Raises:
        ValueError: one is not: its name, what came, what is expected.
    """
    for name, value in given.items():
        expected, fits = RULES[name]
        if not fits(value):
            raise ValueError(f"{name}={_said(value)}: expected {expected}")


def optionally(**given: object) -> None:
    """As :func:`door`, for arguments of which None means that nothing is asked for."""
    door(**{name: value for name, value in given.items() if value is not None})


def whole_numbers(given: object, name: str, wanted: str) -> list[int]:
    """One whole number, or several, as a list.

    Raises:
        ValueError: it is not that, see ``wanted``.
    """
    numbers = np.atleast_1d(np.asarray(given))
    if numbers.ndim != 1 or not len(numbers) or not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(f"{name}={given!r}: {wanted}")
    return numbers.tolist()


def require_latents(given: object, d_sae: int) -> list[int]:
    """One latent's number, or several, as a list.

    Raises:
        ValueError: the dictionary of ``d_sae`` latents has no such.
    """
    numbers = whole_numbers(given, "latent", "a latent's number, or several")
    if not 0 <= min(numbers) <= max(numbers) < d_sae:
        raise ValueError(f"latent={given!r}: the dictionary has 0 to {d_sae - 1:,}")
    return numbers


def _said(value: object) -> str:
    if _tensor(value) or isinstance(value, np.ndarray):
        return f"{type(value).__name__} {tuple(value.shape)}" + " with NaN or inf" * (not _finite(value))
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}… ({type(value).__name__})"
