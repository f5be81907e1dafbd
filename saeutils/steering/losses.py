"""What edits cost: next-token cross-entropy under them, and how much of it an SAE's reconstruction keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from saeutils.kernels.door import door
from saeutils.lm.tokens import begin, encode, heads
from saeutils.steering.edits import AFTER_BOS, SINK, Edit, edit, edited, splice

if TYPE_CHECKING:  # late: together they take seconds to import
    from sae_lens.saes.sae import SAE
    from transformer_lens.model_bridge import TransformerBridge


def only(at: Tensor | tuple[Tensor, ...]) -> Edit:
    """Send nothing but rows ``at`` through the vocabulary, most of a small model's work: logits [1, n, vocabulary]."""
    return "unembed.hook_in", lambda x, hook=None: x[at][None]


def _nll(lm: TransformerBridge, ids: Tensor, wanted: Tensor, edits: Sequence[Edit] = ()) -> Tensor:
    """Cross-entropy (nats) of the tokens that follow positions ``wanted`` [batch, position − 1] of ``ids``, [n]."""
    with edited(lm, [*edits, only(F.pad(wanted, (0, 1)))]):
        logits = lm(ids)[0]  # [n, vocabulary]
    parts = zip(logits.split(32), ids[:, 1:][wanted].split(32))  # float32 copies that fit the cache
    return torch.cat([F.cross_entropy(a.float(), target, reduction="none") for a, target in parts])


@torch.no_grad()
def continuation_loss(
    lm: TransformerBridge, prompts: Sequence[str], texts: Sequence[Sequence[str]], batch_size: int = 64
) -> Tensor:
    """Mean cross-entropy (nats a token) of each continuation under the unedited model → [prompts, samples]."""
    door(lm=lm, prompts=prompts, batch_size=batch_size)
    pairs = [(p, t) for p, row in zip(prompts, texts) for t in row]
    losses = []
    encoded = [(encode(lm, p)[0], lm.tokenizer(t, add_special_tokens=False)["input_ids"]) for p, t in pairs]
    for at in range(0, len(pairs), batch_size):
        part = encoded[at : at + batch_size]
        rows = [torch.cat([p, torch.tensor(t, dtype=p.dtype, device=p.device)]) for p, t in part]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # right-padded: causal, so harmless
        wanted = torch.zeros(len(part), ids.shape[1] - 1, dtype=torch.bool, device=ids.device)
        for row, (p, t) in zip(wanted, part):
            row[len(p) - 1 : len(p) - 1 + len(t)] = True
        losses += [own.mean().cpu() for own in _nll(lm, ids, wanted).split([len(t) for _, t in part])]  # of none: NaN
    return torch.stack(losses).view(len(prompts), -1)


def windows(lm: TransformerBridge, texts: Sequence[str], context: int = 128) -> list[list[int]]:
    """The first ``context`` tokens of each text, BOS included, the shortest first.

    Raises:
        ValueError: no text of at least two tokens.
    """
    door(lm=lm, texts=texts, context=context)
    least = len(begin(lm)) + 2
    rows = sorted((ids for ids in heads(lm, texts, context) if len(ids) >= least), key=len)
    if not rows:
        raise ValueError("no text of at least two tokens to measure the loss on")
    return rows


@torch.no_grad()
def mean_loss(
    lm: TransformerBridge, rows: Sequence[Sequence[int]], edits: Sequence[Edit] = (), batch_size: int = 8,
    each: Callable[[Tensor], None] = lambda real: None,
) -> float:  # fmt: skip
    """Cross-entropy of the next token, nats, averaged over all tokens of ``rows`` (see :func:`windows`), under ``edits``.

    ``each`` is told, before a batch runs, which positions predict a token: [batch, position − 1].
    """
    door(lm=lm, batch_size=batch_size)
    losses = []
    for at in range(0, len(rows), batch_size):
        part = [torch.tensor(r) for r in rows[at : at + batch_size]]
        ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=-1).to(lm.cfg.device)
        wanted = ids[:, 1:] >= 0
        each(wanted)
        losses.append(_nll(lm, ids.clamp_min(0), wanted, edits))
    return float(torch.cat(losses).mean())


@torch.no_grad()
def loss_recovered(
    lm: TransformerBridge, sae: SAE, hook: str, texts: Sequence[str], context: int = 128, batch_size: int = 8,
    known: dict[str, float] | None = None,
) -> dict[str, float]:  # fmt: skip
    """How much of the LM's loss survives when the SAE's reconstruction replaces the activation.

    (L_zero − L_sae)/(L_zero − L_clean), as in SAEBench; also against mean ablation, the harder reference where the
    residual stream has a large constant part. Losses in nats a token over windows of ``context`` tokens. ``known``: what
    an earlier call with the same texts returned; its losses without the SAE are not measured again.

    Returns:
        clean, sae, zero, mean (losses), recovered, recovered_mean.
    """
    door(lm=lm, sae=sae, hook=hook, texts=texts, context=context, batch_size=batch_size)
    rows, total, state = windows(lm, texts, context), [0.0, 0], {}

    def remember(x, hook=None):
        flat = x[F.pad(state["real"], (1, 0), value=not begin(lm))].float()
        fine = flat[(norms := flat.norm(dim=1)) <= SINK * norms.median()]
        total[0], total[1] = total[0] + fine.sum(0), total[1] + len(fine)

    def loss(one: Edit) -> float:
        return mean_loss(lm, rows, [one], batch_size, lambda real: state.update(real=real))

    if known:
        clean, zero, averaged = (known[name] for name in ("clean", "zero", "mean"))
    else:
        clean = loss((hook, remember))
        mean = total[0] / total[1]
        zero = loss(edit(hook, sae.cfg.d_in, lambda x: -x, AFTER_BOS))
        averaged = loss(edit(hook, sae.cfg.d_in, lambda x: mean - x, AFTER_BOS))
    spliced = loss(splice(hook, sae))
    return {
        "clean": clean, "sae": spliced, "zero": zero, "mean": averaged,
        "recovered": (zero - spliced) / (zero - clean), "recovered_mean": (averaged - spliced) / (averaged - clean),
    }  # fmt: skip
