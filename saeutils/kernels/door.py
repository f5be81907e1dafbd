"""What arguments must be, one rule a name: a public function checks its own in one line, before work starts.

    door(steps=steps, lr=lr, texts=texts)

raises ValueError with the argument's name, what came, and what is expected. One name means one thing in all rooms, so the rule
belongs to the name. Where a rule depends on other arguments (a latent of this SAE), the function says so itself.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

Rule = tuple[str, Callable[[object], bool]]  # what is expected, and whether a value is that


def _number(v: object) -> bool:
    if isinstance(v, Tensor) and not v.ndim:
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


def _finite(v: Tensor | np.ndarray) -> bool:
    return bool((torch if isinstance(v, Tensor) else np).isfinite(v).all())


def _array(*ndim: int) -> Callable[[object], bool]:
    return lambda v: isinstance(v, (Tensor, np.ndarray)) and v.ndim in ndim and len(v) > 0 and _finite(v)


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
         "max_k", "n_pairs", "groups", "d_sae", "held_out"), COUNT,
    ),
    **dict.fromkeys(("seed", "token", "layer", "start", "answers", "dense_below"), SEED),
    **dict.fromkeys(("lr", "unit", "tolerance", "l0", "highest", "lowest", "scale"), number(0)),
    **dict.fromkeys(("strength", "value", "factor", "jump"), number()),
    **dict.fromkeys(("temperature", "damage"), number(0, least=True)),
    **dict.fromkeys(("share", "rate", "min_f1", "unseen"), number(0, 1)),
    "context": whole(2),
    **dict.fromkeys(("x", "W_dec", "z", "h"), MATRIX),
    **dict.fromkeys(("direction", "directions"), ("a direction [d], or several [n, d], of finite numbers", _array(1, 2))),
    "ids": ("token ids [batch, position]", lambda v: isinstance(v, Tensor) and v.ndim == 2 and v.numel() > 0 and not v.is_floating_point()),
    **dict.fromkeys(("texts", "prompts"), TEXTS),
    **dict.fromkeys(("prompt", "hook", "name"), ("a text that is not empty", lambda v: isinstance(v, str) and bool(v.strip()))),
    **dict.fromkeys(("sae", "a", "b"), SAE),
    "saes": ("SAEs, at least one", lambda v: isinstance(v, (Sequence, Mapping)) and len(v) > 0 and all(SAE[1](s) for s in (v.values() if isinstance(v, Mapping) else v))),
    "lm": ("a TransformerBridge (models.load_lm makes one)", _has("hook_dict", "tokenizer", "original_model")),
    "tokenizer": ("a tokenizer", _has("decode", "convert_ids_to_tokens")),
    "acts": ("what activations.collect gives", _has("meta", "batches", "all")),
    "table": ("what features.latent_table gives", _has("acts", "doc", "n_docs")),
    **dict.fromkeys(("change", "decoder"), ("a function", callable)),
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


def _said(value: object) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{type(value).__name__} {tuple(value.shape)}" + " with NaN or inf" * (not _finite(value))
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}… ({type(value).__name__})"
