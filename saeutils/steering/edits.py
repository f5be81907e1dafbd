"""Edits of the residual stream while a TransformerBridge runs: each is a (hook point, function) pair, and they compose.

    with edited(lm, [add(hook, sae.W_dec[7], 40.0), clamp(hook, sae, 9, 0.0)]):
        generate(lm, ["he is such a"])

Latent edits add decode(f′) − decode(f) to the activation: whatever the SAE does not reconstruct (its error term) stays
in place, so nothing cancels the edit, and an SAE that normalises its input gets each token's own scale back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:  # late: together they take seconds to import
    from sae_lens.saes.sae import SAE
    from transformer_lens.model_bridge import TransformerBridge

Edit = tuple[str, Callable[..., Tensor]]
Positions = slice | Sequence[int] | None
AFTER_BOS = slice(1, None)
SINK = 10.0  # rows with a norm above this many medians are attention sinks


def _edit(hook: str, d: int, delta: Callable[[Tensor], Tensor], positions: Positions) -> Edit:
    """Wrap ``delta`` (rows [n, d] → rows [n, d] to add) so that it acts on the chosen positions only.

    Positions count from the start of the prompt, generated tokens go on from there; with a key-value cache the hook sees
    one new position a call, so the count is kept here. Negative ones count from the prompt's end; None means every one.
    The default everywhere is all but BOS and other attention sinks, whose activations are of another scale.
    """
    wanted = positions if positions is None or isinstance(positions, slice) else sorted(positions)
    state, name = {"seen": 0, "prompt": 0}, hook

    def apply(x: Tensor, hook=None) -> Tensor:  # x [batch, position, d]
        length = x.shape[1]
        if x.shape[2] != d:
            raise ValueError(f"the edit has d={d}, {name} has d={x.shape[2]}: direction or SAE of another model?")
        if length > 1 or not state["prompt"]:
            state.update(seen=0, prompt=length)
        place = torch.arange(state["seen"], state["seen"] + length, device=x.device)
        state["seen"] += length
        chosen = True if wanted is None else _selected(place, wanted, state["prompt"])
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) & chosen
        if positions == AFTER_BOS and length > 2:
            norms = x.float().norm(dim=-1)  # [batch, position]
            mask = mask & (norms <= SINK * norms.median())
        if not mask.any():
            return x
        out = x.clone()
        out[mask] = (x[mask].float() + delta(x[mask].float())).to(x.dtype)
        return out

    return hook, apply


def _selected(place: Tensor, wanted: slice | list[int], prompt: int) -> Tensor:
    if isinstance(wanted, slice):
        start, stop, step = wanted.start or 0, wanted.stop, wanted.step or 1
        start = start + prompt if start < 0 else start
        stop = None if stop is None else stop + prompt if stop < 0 else stop
        return (place >= start) & ((place - start) % step == 0) & (place < stop if stop is not None else True)
    numbers = torch.tensor([p + prompt if p < 0 else p for p in wanted], device=place.device)
    return torch.isin(place, numbers)


def add(hook: str, direction: Tensor, strength: float = 1.0, positions: Positions = AFTER_BOS) -> Edit:
    """x ← x + strength·direction, for ``direction`` [d], or [n, d] with one row for each edited position of a batch.

    Not normalised here: the strength is in its units.
    """
    vector = (strength * direction).detach().float()
    return _edit(hook, vector.shape[-1], lambda x: vector.to(x.device).expand_as(x), positions)


def latents(hook: str, sae: SAE, change: Callable[[Tensor], Tensor], positions: Positions = AFTER_BOS) -> Edit:
    """x ← x + decode(change(f)) − decode(f) with f = encode(x) [n, d_sae]; ``change`` returns new activations."""
    if (trained_at := sae.cfg.metadata.hook_name) and trained_at != hook:
        raise ValueError(f"the SAE was trained at {trained_at}, not at {hook}")

    @torch.no_grad()
    def delta(x: Tensor) -> Tensor:
        x = x.to(sae.dtype)
        acts = sae.encode(x)
        before = sae.decode(acts)  # uses, and forgets, the input scale that encode has just measured
        sae.run_time_activation_norm_fn_in(x)
        return (sae.decode(change(acts.clone())) - before).float()

    return _edit(hook, sae.cfg.d_in, delta, positions)


def _checked(sae: SAE, latent: int | Sequence[int]) -> list[int]:
    numbers = [latent] if isinstance(latent, int) else list(latent)
    if bad := [n for n in numbers if not 0 <= n < sae.cfg.d_sae]:
        raise ValueError(f"latents {bad} are outside the dictionary: 0…{sae.cfg.d_sae - 1}")
    return numbers


def clamp(hook: str, sae: SAE, latent: int | Sequence[int], value: float, positions: Positions = AFTER_BOS) -> Edit:
    """Set latents to ``value``, in the SAE's own units (after its input normalisation)."""
    numbers = _checked(sae, latent)
    return latents(hook, sae, lambda f: f.index_fill(1, torch.tensor(numbers, device=f.device), value), positions)


def scale(hook: str, sae: SAE, latent: int | Sequence[int], factor: float, positions: Positions = AFTER_BOS) -> Edit:
    """Multiply latents by ``factor`` wherever they are active."""
    numbers = torch.tensor(_checked(sae, latent))
    return latents(hook, sae, lambda f: f.index_copy(1, numbers.to(f.device), f[:, numbers] * factor), positions)


def ablate(hook: str, sae: SAE, latent: int | Sequence[int], positions: Positions = AFTER_BOS) -> Edit:
    """Set latents to zero."""
    return clamp(hook, sae, latent, 0.0, positions)


def project_out(hook: str, directions: Tensor, positions: Positions = AFTER_BOS) -> Edit:
    """Remove the span of ``directions`` [d] or [n, d] from the activation."""
    basis = torch.linalg.qr(torch.atleast_2d(directions).detach().float().T)[0]  # [d, n]
    return _edit(hook, len(basis), lambda x: -(x @ basis.to(x.device)) @ basis.to(x.device).T, positions)


def splice(hook: str, sae: SAE) -> Edit:
    """x ← decode(encode(x)): the SAE's reconstruction in place of the activation (BOS and sinks excepted)."""
    return _edit(hook, sae.cfg.d_in, torch.no_grad()(lambda x: sae(x.to(sae.dtype)).float() - x), AFTER_BOS)


@contextmanager
def edited(lm: TransformerBridge, edits: Iterable[Edit]):
    """Apply edits, in order, for the length of the block; removed on exit, after an exception too.

    Raises:
        ValueError: the model has no such hook point (before anything runs).
    """
    edits = list(edits)
    if missing := sorted({name for name, _ in edits} - set(lm.hook_dict)):
        raise ValueError(f"{lm.cfg.model_name} has no hook points {missing}; it has blocks 0…{lm.cfg.n_layers - 1}")
    with lm.hooks(fwd_hooks=edits):
        yield lm


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

    Prompts of equal token length share a batch, so nothing is padded. Temperature 0 is greedy; sampling is seeded, and
    leaves the global random state as it was.
    """
    if not prompts or any(not p for p in prompts):
        raise ValueError("give at least one prompt, none of them empty")
    ids = [lm.to_tokens(p)[0] for p in prompts for _ in range(samples)]
    out: list[str] = [""] * len(ids)
    devices = [lm.cfg.device] if str(lm.cfg.device).startswith("cuda") else []
    with torch.random.fork_rng(devices=devices), edited(lm, edits):
        torch.manual_seed(seed)
        for batch in same_length(ids, batch_size):
            made = continued(lm, torch.stack([ids[i] for i in batch]), tokens, temperature)
            for i, row in zip(batch, made):
                out[i] = lm.tokenizer.decode(row, skip_special_tokens=True)
    return [out[i : i + samples] for i in range(0, len(out), samples)]


@torch.no_grad()
def continued(lm: TransformerBridge, ids: Tensor, tokens: int, temperature: float = 0.0) -> Tensor:
    """Token ids [batch, prompt] → the tokens that follow [batch, tokens], with a key-value cache; greedy at temperature 0.

    Samples by inverting the cumulative distribution, one uniform number a row: over Gemma's 262k tokens this takes half the
    time of ``lm.generate``, which draws one number a token of the vocabulary.
    """
    made, cache = [], None
    for _ in range(tokens):
        out = lm.original_model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = out.past_key_values, out.logits[:, -1].float()  # [batch, vocabulary]
        if temperature:
            mass = (logits / temperature).softmax(-1).cumsum(-1)
            u = torch.rand(len(mass), 1, device=mass.device) * mass[:, -1:]
            ids = torch.searchsorted(mass, u).clamp_max(mass.shape[1] - 1)
        else:
            ids = logits.argmax(-1, keepdim=True)
        made.append(ids)
    return torch.cat(made, dim=1)


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
    pairs = [(p, t) for p, row in zip(prompts, texts) for t in row]
    losses = []
    encoded = [(lm.to_tokens(p)[0], lm.tokenizer(t, add_special_tokens=False)["input_ids"]) for p, t in pairs]
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
    bos = [lm.tokenizer.bos_token_id] if lm.tokenizer.bos_token_id is not None else []
    encoded = lm.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    rows = sorted((r for e in encoded if len(r := bos + e[: context - len(bos)]) > 2), key=len)
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
    rows, total, state = windows(lm, texts, context), [0.0, 0], {}

    def remember(x, hook=None):
        flat = x[:, 1:][state["real"]].float()
        fine = flat[(norms := flat.norm(dim=1)) <= SINK * norms.median()]
        total[0], total[1] = total[0] + fine.sum(0), total[1] + len(fine)

    def loss(edit: Edit) -> float:
        return mean_loss(lm, rows, [edit], batch_size, lambda real: state.update(real=real))

    if known:
        clean, zero, averaged = (known[name] for name in ("clean", "zero", "mean"))
    else:
        clean = loss((hook, remember))
        mean = total[0] / total[1]
        zero = loss(_edit(hook, sae.cfg.d_in, lambda x: -x, AFTER_BOS))
        averaged = loss(_edit(hook, sae.cfg.d_in, lambda x: mean - x, AFTER_BOS))
    spliced = loss(splice(hook, sae))
    return {
        "clean": clean, "sae": spliced, "zero": zero, "mean": averaged,
        "recovered": (zero - spliced) / (zero - clean), "recovered_mean": (averaged - spliced) / (averaged - clean),
    }  # fmt: skip
