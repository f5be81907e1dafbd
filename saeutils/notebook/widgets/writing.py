"""What the steering pane asks of the model: a setting, its edits, the text token by token, a control of equal norm, meters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import normalize

from saeutils import metrics, steering
from saeutils.analysis.features import residual
from saeutils.kernels.door import require_latents
from saeutils.lm.tokens import encode, ends, until_end

if TYPE_CHECKING:  # late: together they take seconds to import
    from sae_lens.saes.sae import SAE
    from transformer_lens.model_bridge import TransformerBridge

MODES = ("add", "clamp", "ablate", "project out")
LONGEST = 200  # tokens of a prompt: longer ones would no longer answer within seconds


@dataclass(frozen=True)
class Setting:
    """All that a text depends on; ``slots``: (mode, latent, strength), strengths of ``add`` in units of the residual's spread,
    of ``clamp`` in units of the latent's own 99th percentile.
    """

    prompt: str
    slots: tuple[tuple[str, int, float], ...] = ()
    temperature: float = 0.0
    seed: int = 0
    tokens: int = 24

    def __str__(self) -> str:
        edits = ", ".join(f"{mode} {latent}" + (f" × {by:g}" if mode in MODES[:2] else "") for mode, latent, by in self.slots)
        return f"{self.prompt[:24]} | {edits or 'no edit'} | T {self.temperature:g}, sample {self.seed}"


def check(lm: TransformerBridge, sae: SAE, setting: Setting) -> None:
    """Can the setting be run?

    Raises:
        ValueError: no prompt, or a very long one; a latent that the SAE has not.
    """
    if not setting.prompt.strip():
        raise ValueError("write a prompt first")
    if (n := encode(lm, setting.prompt).shape[1]) > LONGEST:
        raise ValueError(f"the prompt has {n:,} tokens: shorten it to {LONGEST}")
    for _, latent, _ in setting.slots:
        require_latents(latent, sae.cfg.d_sae)


def edits(sae: SAE, hook: str, setting: Setting, unit: float, typical: Callable[[int], float]) -> list:
    """The edits of a setting; ``unit``: the residual's spread, ``typical``: a latent's own large activation."""
    made = []
    for mode, latent, by in setting.slots:
        if mode == "add":
            made.append(steering.add(hook, normalize(sae.W_dec[latent].detach().float(), dim=0), by * unit))
        elif mode == "clamp":
            made.append(steering.clamp(hook, sae, latent, by * typical(latent)))
        elif mode == "ablate":
            made.append(steering.ablate(hook, sae, latent))
        else:
            made.append(steering.project_out(hook, sae.W_dec[latent]))
    return made


@torch.no_grad()
def control(lm: TransformerBridge, hook: str, setting: Setting, given: Sequence) -> list:
    """A random direction, drawn by the setting's seed, that moves the prompt's tokens as far as the given edits do."""
    ids = encode(lm, setting.prompt)
    moved = (residual(lm, hook, ids, given) - residual(lm, hook, ids))[0].float()  # [position, d]
    length = float(moved.norm(dim=1).max())
    direction = torch.randn(moved.shape[1], generator=torch.Generator().manual_seed(setting.seed))
    return [steering.add(hook, normalize(direction, dim=0), length)]


def growing(lm: TransformerBridge, setting: Setting, given: Sequence, check: Callable[[], None]) -> Iterator[str]:
    """The continuation after each token; the last is what :func:`saeutils.steering.generate` gives. ``check`` may raise."""
    made, last = [], ends(lm)
    steps = steering.stepwise(
        lm, encode(lm, setting.prompt), setting.temperature, torch.Generator().manual_seed(setting.seed)
    )
    for _ in range(setting.tokens):
        check()
        with steering.edited(lm, given):  # a token at a time: others may use the model in between
            made.append(int(next(steps)))
        yield lm.tokenizer.decode(until_end(made, last), skip_special_tokens=True)
        if made[-1] in last:
            break


@cache
def _vader():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def meters(lm: TransformerBridge, prompt: str, written: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Measure → text → value; the first text is what the others' extra nats count from."""
    losses = steering.continuation_loss(lm, [prompt], [list(written.values())])[0].tolist()
    return {
        "sentiment (VADER, −1 … 1)": {name: _vader().polarity_scores(text)["compound"] for name, text in written.items()},
        "extra nats a token": dict(zip(written, [loss - losses[0] for loss in losses])),
        "repeated token pairs": {name: metrics.repetition(lm.tokenizer(text, add_special_tokens=False)["input_ids"]) for name, text in written.items()},
    }
