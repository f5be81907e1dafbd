"""Edits of the residual stream while a TransformerBridge runs: each is a (hook point, function) pair, and they compose.

    with edited(lm, [add(hook, sae.W_dec[7], 40.0), clamp(hook, sae, 9, 0.0)]):
        generate(lm, ["he is such a"])

Latent edits add decode(f′) − decode(f) to the activation: whatever the SAE does not reconstruct (its error term) stays
in place, so nothing cancels the edit, and an SAE that normalises its input gets each token's own scale back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from saeutils.kernels.door import door, require_latents, whole_numbers
from saeutils.lm import tokens
from saeutils.lm.provenance import require_raw

if TYPE_CHECKING:  # late: together they take seconds to import
    from sae_lens.saes.sae import SAE
    from transformer_lens.model_bridge import TransformerBridge

Edit = tuple[str, Callable[..., Tensor]]
Positions = int | slice | Sequence[int] | np.ndarray | Tensor | None
AFTER_BOS = slice(1, None)  # this very slice: from the first token on where a text has no BOS
SINK = 10.0  # rows with a norm above this many medians are attention sinks
_LOCKS: WeakKeyDictionary = WeakKeyDictionary()  # language model → the lock of who edits it
_FIRST = threading.Lock()
_NOW = threading.local()  # .call: what the model of this thread's block is reading


class _Call(NamedTuple):
    """One pass of a model: how many tokens its cache holds, and which texts [batch] begin with a token of their own, not with BOS."""

    before: int
    without_bos: Tensor | bool


_ALONE = _Call(0, False)  # an edit that is called by hand


def edit(hook: str, d: int, delta: Callable[[Tensor], Tensor], positions: Positions) -> Edit:
    """Wrap ``delta`` (rows [n, d] → rows [n, d] to add) so that it acts on the chosen positions only.

    Positions count from the start of the text, generated tokens go on from there: :func:`edited` tells how many tokens the
    key-value cache holds. Negative ones count from the prompt's end; None means every one. The default everywhere is all
    but BOS, where the text has one, and other attention sinks, whose activations are of another scale.

    Raises:
        ValueError: positions that are no whole numbers, slice or None, or a slice that goes backwards.
    """
    wanted = _wanted(positions)
    prompt = 0

    def apply(x: Tensor, hook=None) -> Tensor:  # x [batch, position, d]
        nonlocal prompt
        length, call = x.shape[1], getattr(_NOW, "call", _ALONE)
        if x.shape[2] != d:
            raise ValueError(f"the edit has d={d}, {name} has d={x.shape[2]}: direction or SAE of another model?")
        prompt = prompt if call.before else length
        place = torch.arange(call.before, call.before + length, device=x.device)
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if positions is AFTER_BOS:
            if not call.before:
                mask[:, 0] = call.without_bos
            if length > 2:
                norms = x.float().norm(dim=-1)  # [batch, position]
                mask = mask & (norms <= SINK * norms.median())
        elif wanted is not None:
            mask = mask & _selected(place, wanted, prompt)
        if not mask.any():
            return x
        apply.met = True
        out = x.clone()
        out[mask] = (x[mask].float() + delta(x[mask].float())).to(x.dtype)
        return out

    name = hook
    apply.wanted, apply.met = None if positions is AFTER_BOS else wanted, False
    return hook, apply


def _wanted(positions: Positions) -> slice | list[int] | None:
    if positions is None:
        return None
    if isinstance(positions, slice):
        if (positions.step or 1) < 1:
            raise ValueError(f"positions={positions} goes backwards: take a step of at least 1")
        return positions
    return sorted(whole_numbers(positions, "positions", "whole numbers, a slice or None (all)"))


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
    door(hook=hook, direction=direction, strength=strength)
    vector = (strength * direction).detach().float()
    return edit(hook, vector.shape[-1], lambda x: vector.to(x.device).expand_as(x), positions)


def latents(hook: str, sae: SAE, change: Callable[[Tensor], Tensor], positions: Positions = AFTER_BOS) -> Edit:
    """x ← x + decode(change(f)) − decode(f) with f = encode(x) [n, d_sae]; ``change`` returns new activations.

    Raises:
        ValueError: the SAE was trained at another hook point, or takes other rows than the model's activations.
    """
    door(hook=hook, sae=sae, change=change)
    require_raw(sae, hook)

    @torch.no_grad()
    def delta(x: Tensor) -> Tensor:
        home, x = x.device, x.to(sae.device, sae.dtype)
        acts = sae.encode(x)
        before = sae.decode(acts)  # uses, and forgets, the input scale that encode has just measured
        sae.run_time_activation_norm_fn_in(x)
        return (sae.decode(change(acts.clone())) - before).float().to(home)

    return edit(hook, sae.cfg.d_in, delta, positions)


def clamp(hook: str, sae: SAE, latent: int | Sequence[int], value: float, positions: Positions = AFTER_BOS) -> Edit:
    """Set latents to ``value``, in the SAE's own units (after its input normalisation)."""
    door(value=value, sae=sae)
    numbers = require_latents(latent, sae.cfg.d_sae)
    return latents(hook, sae, lambda f: f.index_fill(1, torch.tensor(numbers, device=f.device), value), positions)


def scale(hook: str, sae: SAE, latent: int | Sequence[int], factor: float, positions: Positions = AFTER_BOS) -> Edit:
    """Multiply latents by ``factor`` wherever they are active."""
    door(factor=factor, sae=sae)
    numbers = torch.tensor(require_latents(latent, sae.cfg.d_sae))
    return latents(hook, sae, lambda f: f.index_copy(1, numbers.to(f.device), f[:, numbers] * factor), positions)


def ablate(hook: str, sae: SAE, latent: int | Sequence[int], positions: Positions = AFTER_BOS) -> Edit:
    """Set latents to zero."""
    return clamp(hook, sae, latent, 0.0, positions)


def project_out(hook: str, directions: Tensor, positions: Positions = AFTER_BOS) -> Edit:
    """Remove the span of ``directions`` [d] or [n, d] from the activation; what depends on others, or is zero, spans nothing more.

    Raises:
        ValueError: NaN or inf in the directions.
    """
    door(hook=hook, directions=directions)
    rows = torch.atleast_2d(directions).detach().double()
    rows = torch.nn.functional.normalize(rows, dim=1)  # a short direction counts as much as a long one
    _, sizes, vectors = torch.linalg.svd(rows, full_matrices=False)
    basis = vectors[sizes > 1e-6].T.float()  # [d, rank]
    return edit(hook, len(basis), lambda x: -(x @ basis.to(x.device)) @ basis.to(x.device).T, positions)


def splice(hook: str, sae: SAE) -> Edit:
    """x ← decode(encode(x)): the SAE's reconstruction in place of the activation (BOS and sinks excepted).

    Raises:
        ValueError: as :func:`latents`.
    """
    door(hook=hook, sae=sae)
    require_raw(sae, hook)
    return edit(hook, sae.cfg.d_in, torch.no_grad()(lambda x: sae(x.to(sae.device, sae.dtype)).float().to(x.device) - x), AFTER_BOS)


@contextmanager
def edited(lm: TransformerBridge, edits: Iterable[Edit]):
    """Apply edits, in order, for the length of the block; removed on exit, after an exception too.

    Edits act in the thread that entered the block alone, and one thread at a time edits a model: others wait at their own
    block, a plain ``lm(ids)`` elsewhere is untouched. (Widgets' callbacks run in threads of their own.)

    Raises:
        ValueError: the model has no such hook point (before anything runs); at the block's end: an edit at given positions
            none of which came.
    """
    door(lm=lm)
    edits = list(edits)
    given = [apply for _, apply in edits if getattr(apply, "wanted", None) is not None]
    if missing := sorted({name for name, _ in edits} - set(lm.hook_dict)):
        raise ValueError(f"{lm.cfg.model_name} has no hook points {missing}; it has blocks 0…{lm.cfg.n_layers - 1}")
    with _FIRST:
        lock = _LOCKS.setdefault(lm, threading.RLock())
    owner, bos, read = threading.get_ident(), tokens.begin(lm), []

    def note(_model, args: tuple, kwargs: dict) -> None:
        if threading.get_ident() == owner:
            ids, cache = kwargs.get("input_ids", args[0] if args else None), kwargs.get("past_key_values")
            before = 0 if cache is None else cache.get_seq_length()
            read.append(before + ids.shape[1] if ids is not None else 0)
            _NOW.call = _Call(before, not bos if ids is None or not bos else ids[:, 0] != bos[0])

    def bound(apply: Callable[..., Tensor]) -> Callable[..., Tensor | None]:
        return lambda x, hook=None: apply(x, hook=hook) if threading.get_ident() == owner else None

    with lock, lm.hooks(fwd_hooks=[(name, bound(apply)) for name, apply in edits]):
        for apply in given:
            apply.met = False
        told = lm.original_model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield lm
            if read and (missed := [apply.wanted for apply in given if not apply.met]):
                raise ValueError(f"positions={missed[0]} never came: the longest text had {max(read)} tokens, counted from 0")
        finally:
            told.remove()
            _NOW.call = _ALONE
