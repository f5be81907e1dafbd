"""Text and token ids, one rule for everything: a tokenizer's own BOS in front, once; generation ends at the end token.

A model without a BOS of its own (Qwen 2, OLMo 2) gets none. TransformerLens lets its end token stand in; a bridge of
:func:`saeutils.lm.models.load_lm` does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

CHARACTERS = 100  # more than a text's tokens have on average, whatever the text

if TYPE_CHECKING:  # late: they take seconds to import
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase


def bos_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The id of BOS in a list, or none, by a tokenizer as it was read from disk; of a bridge see :func:`begin`."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def begin(lm: TransformerBridge) -> list[int]:
    """What a text begins with in this model: the id of BOS in a list, or nothing."""
    return bos_of(lm.tokenizer) if getattr(lm.cfg, "default_prepend_bos", True) else []


def encode(lm: TransformerBridge, text: str) -> Tensor:
    """Token ids of a text, [1, position], on the model's device; a text that begins with BOS already (a chat template's) gets no second.

    Raises:
        ValueError: not a text, or one without tokens.
    """
    if not isinstance(text, str):
        raise ValueError(f"a text is expected, not {type(text).__name__}")
    ids, first = lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], begin(lm)
    ids = ids if first and ids[:1] == first else [*first, *ids]
    if not ids:
        raise ValueError("the text has no tokens")
    return torch.tensor([ids], device=lm.cfg.device)


def heads(lm: TransformerBridge, texts: Sequence[str], n: int) -> list[list[int]]:
    """The first ``n`` token ids of each text, BOS among them; of a book no more is tokenised than that may need.

    Raises:
        ValueError: one text where a list is expected; n without room for a token.
    """
    first = begin(lm)
    if isinstance(texts, str):
        raise ValueError("give a list of texts, not one text: [text]")
    if n <= len(first):
        raise ValueError(f"windows of {n} tokens have no room for one behind BOS: take more")
    cut = [t[: n * CHARACTERS] for t in texts]
    encoded = lm.tokenizer(cut, add_special_tokens=False, verbose=False)["input_ids"] if cut else []
    return [[*first, *ids[: n - len(first)]] for ids in encoded]


def ends(lm: TransformerBridge) -> set[int]:
    """Ids after which a text is over: the tokenizer's end token and those of the model's generation settings (Gemma has two)."""
    told = getattr(lm.original_model.generation_config, "eos_token_id", None)
    more = told if isinstance(told, (list, tuple)) else [told]
    return {i for i in (lm.tokenizer.eos_token_id, *more) if i is not None}


def until_end(ids: Sequence[int], ends: set[int]) -> Sequence[int]:
    """``ids`` up to the first of ``ends``, without it."""
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]
