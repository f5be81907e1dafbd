"""Text from a language model while edits act on it: greedy or sampled, batched by prompt length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saeutils.kernels.door import door
from saeutils.lm import parts
from saeutils.lm.tokens import encode, ends, until_end
from saeutils.steering.edits import Edit, edited

if TYPE_CHECKING:  # late: it takes seconds to import
    from transformer_lens.model_bridge import TransformerBridge


def same_length(ids: Sequence[Tensor], size: int) -> Iterator[list[int]]:
    """Numbers of prompts of one length, up to ``size`` at a time, the shortest first: nothing needs padding."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    while order:
        batch = [i for i in order[:size] if len(ids[i]) == len(ids[order[0]])]
        order = order[len(batch) :]
        yield batch


@torch.no_grad()
def generate(
    lm: TransformerBridge, prompts: Sequence[str], edits: Iterable[Edit] = (), *, tokens: int = 24,
    temperature: float = 0.0, samples: int = 1, seed: int = 0, batch_size: int = 64,
) -> list[list[str]]:  # fmt: skip
    """Continuations: for every prompt a list of ``samples`` texts (the prompt not included).

    Prompts of equal token length share a batch, so nothing is padded. A text ends before the model's end token. Temperature
    0 is greedy; sampling is seeded, and leaves the global random state as it was.

    Raises:
        ValueError: no prompt, an empty one, or one text where a list is expected; no token or sample asked for, more tokens
            than the model has positions; edits at hook points that the model lacks.
    """
    door(lm=lm, prompts=prompts, tokens=tokens, temperature=temperature, samples=samples, seed=seed, batch_size=batch_size)
    if any(not p for p in prompts):
        raise ValueError("prompts: none of them may be empty")
    ids = [encode(lm, p)[0] for p in prompts for _ in range(samples)]
    require_room(lm, max(map(len, ids)) + tokens)
    out, last = [""] * len(ids), ends(lm)
    generator = torch.Generator().manual_seed(int(seed))
    with edited(lm, edits):
        for batch in same_length(ids, batch_size):
            made = continued(lm, torch.stack([ids[i] for i in batch]), tokens, temperature, generator)
            for i, row in zip(batch, made.tolist()):
                out[i] = lm.tokenizer.decode(until_end(row, last), skip_special_tokens=True)
    return [out[i : i + samples] for i in range(0, len(out), samples)]


def continued(
    lm: TransformerBridge, ids: Tensor, tokens: int, temperature: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """Token ids [batch, prompt] → the tokens that follow [batch, ≤ tokens], see :func:`stepwise`.

    Fewer where every text has come to its end token; what a text has behind its own means nothing.
    """
    door(lm=lm, ids=ids, tokens=tokens, temperature=temperature)
    last, over, made = torch.tensor(sorted(ends(lm)), device=ids.device), torch.zeros(len(ids), dtype=torch.bool), []
    for step in islice(stepwise(lm, ids, temperature, generator), tokens):
        made.append(step)
        if (over := over | torch.isin(step[:, 0], last).cpu()).all():
            break
    return torch.cat(made, dim=1)


def require_room(lm: TransformerBridge, length: int) -> None:
    """Raises:
    ValueError: the model has fewer positions than ``length``.
    """
    if length > (most := parts.positions(lm.original_model)):
        raise ValueError(f"{length:,} tokens with the prompt; {lm.cfg.model_name} reads {most:,}: ask for fewer")


def stepwise(
    lm: TransformerBridge, ids: Tensor, temperature: float = 0.0, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Endless next tokens [batch, 1] after token ids [batch, prompt], with a key-value cache; greedy at temperature 0.

    Samples by inverting the cumulative distribution, one uniform number a row: over Gemma's 262k tokens this takes half the
    time of ``lm.generate``, which draws one number a token of the vocabulary. Between two tokens the caller may stop.
    """
    door(lm=lm, ids=ids, temperature=temperature)
    cache = None
    while True:
        with torch.no_grad():
            out = lm.original_model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, logits = out.past_key_values, out.logits[:, -1].float()  # [batch, vocabulary]
            if temperature:
                mass = (logits / temperature).softmax(-1).cumsum(-1)
                u = torch.rand(len(mass), 1, generator=generator).to(mass) * mass[:, -1:]  # on the CPU: one text a seed
                ids = torch.searchsorted(mass, u).clamp_max(mass.shape[1] - 1)
            else:
                ids = logits.argmax(-1, keepdim=True)
        yield ids
