"""What a dictionary can change: unlearning of a topic, and RAVEL-style disentanglement of facts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from saeutils import steering
from saeutils.kernels.door import door
from saeutils.lm.tokens import encode

if TYPE_CHECKING:  # late: together they take seconds to import
    from sae_lens.saes.sae import SAE
    from transformer_lens.model_bridge import TransformerBridge


@torch.no_grad()
def firing_rates(sae: SAE, x: Tensor) -> Tensor:
    """Share of rows ``x`` [n, d] on which each latent fires, [d_sae]."""
    total = sum((sae.encode(part.to(sae.device, sae.dtype)) > 0).sum(0) for part in x.split(2048))
    return (total / len(x)).float().cpu()


def unlearning(
    lm: TransformerBridge,
    sae: SAE,
    hook: str,
    forget: tuple[Tensor, list, float],
    retain: tuple[Tensor, list, float],
    unit: float,
    settings: Sequence[tuple[int, float]] = ((10, 0.1), (20, 0.3)),
    rate: float = 0.01,
    damage: float = 0.02,
) -> dict[str, float]:
    """How much a topic's loss rises when its latents are pushed below zero, at little cost elsewhere.

    SAEBench's procedure: drop latents that fire on more than ``rate`` of retained tokens, take the n that fire most on the
    topic, set them to −m wherever they fire. It scores multiple-choice questions of an instruction-tuned model; here the
    score is the largest rise of the topic's loss (nats a token) among settings (n, m in units of ``unit``) that raise the
    retained loss by at most ``damage``, less that rise; 0 where none does.

    Args:
        forget, retain: rows [n, d] to select latents on; token windows of other texts; their loss without an edit.
        unit: a length of the residual stream, such as its median norm.
    """
    door(lm=lm, sae=sae, hook=hook, unit=unit, rate=rate, damage=damage)
    order = (firing_rates(sae, forget[0]) * (firing_rates(sae, retain[0]) < rate)).argsort(descending=True)
    best = {"score": 0.0, "forget": 0.0, "retain": 0.0}
    for n, m in settings:
        picked = order[:n].to(sae.device)

        def push(f: Tensor, picked=picked, m=m) -> Tensor:
            f[:, picked] = torch.where(f[:, picked] > 0, -m * unit, 0.0)
            return f

        edit = steering.latents(hook, sae, push)
        rise, cost = (steering.mean_loss(lm, windows, [edit]) - clean for _, windows, clean in (forget, retain))
        if cost <= damage and rise - cost > best["score"]:
            best = {"score": rise - cost, "forget": rise, "retain": cost}
    return best


class Facts:
    """Prompts that a language model answers right, the states at their entity, and what an answer depends on.

    Args:
        prompts: attribute → prompt with ``{}`` for the entity. entities: rows with ``name`` and a value of each attribute.

    Only entities whose every attribute is answered right (by the largest logit among the first tokens of all values)
    count. Interventions act at the entity's last token, as in RAVEL (Huang et al. 2024, arXiv:2402.17700) and SAEBench. A
    late ``hook`` finds nothing there: the facts have moved on (Gemma-3-270m, countries of forty pairs of cities: exchanging
    that state turns every answer after block 9 and none after block 12).

    Raises:
        ValueError: fewer than four entities are known, or all known ones share an attribute.
    """

    def __init__(self, lm: TransformerBridge, hook: str, prompts: dict[str, str], entities: list[dict[str, str]]):
        self.lm, self.hook = lm, hook
        values = {a: sorted({e[a] for e in entities}) for a in prompts}
        first = {v: self._first(v) for a in prompts for v in values[a]}
        state, known = {}, np.ones(len(entities), dtype=bool)
        for a, prompt in prompts.items():
            asked = [self._prompt(prompt, e["name"]) for e in entities]
            x, logits = self._run(asked)
            options = torch.tensor([first[v] for v in values[a]])
            answer = torch.tensor([first[e[a]] for e in entities])
            known &= (options[logits[:, options].argmax(1)] == answer).numpy()
            state[a] = (asked, x, answer)
        kept = np.flatnonzero(known)
        if len(kept) < 4:
            raise ValueError(
                f"the LM knows {len(kept)} of {len(entities)} entities: give better known ones or other prompts"
            )
        if same := [a for a in prompts if len(state[a][2][kept].unique()) < 2]:
            raise ValueError(f"all known entities have one {same[0]}: give entities that differ in it")
        self.known, self.attributes = len(kept), list(prompts)
        self.asked = {a: [state[a][0][i] for i in kept] for a in prompts}
        self.x = {a: state[a][1][kept] for a in prompts}  # [known, d]
        self.answer = {a: state[a][2][kept] for a in prompts}  # first token of the right value
        self.options = {a: self.answer[a].unique() for a in prompts}

    def _first(self, value: str) -> int:
        return self.lm.tokenizer(" " + value, add_special_tokens=False)["input_ids"][0]

    def _prompt(self, prompt: str, name: str) -> tuple[Tensor, int]:
        """A prompt's token ids, and at which of them its entity ends."""
        return encode(self.lm, prompt.format(name))[0], len(encode(self.lm, prompt.split("{}")[0] + name)[0]) - 1

    def _run(
        self,
        asked: list[tuple[Tensor, int]],
        replaced: Tensor | None = None,
        gradient: tuple[Tensor, Tensor] | None = None,
        size: int = 32,
    ) -> tuple[Tensor, Tensor]:
        """(state where the entity ends, or ∂(logit a − logit b)/∂state if ``gradient`` = (a, b); last logits), both [n, …]."""
        states, logits = [], []
        for at in range(0, len(asked), size):
            part, spots = zip(*asked[at : at + size])
            end = torch.tensor([len(p) - 1 for p in part], device=self.lm.cfg.device)
            spot = torch.tensor(spots, device=end.device)
            row, seen = torch.arange(len(part), device=end.device), {}

            def edit(x, hook=None, at=at, row=row, spot=spot, seen=seen):
                x = x.clone()
                if replaced is not None:
                    x[row, spot] = replaced[at : at + len(row)].to(x)
                if gradient is not None:
                    seen["delta"] = torch.zeros(
                        x.shape[0], x.shape[2], device=x.device, dtype=x.dtype, requires_grad=True
                    )
                    x[row, spot] = x[row, spot] + seen["delta"]
                seen["x"] = x[row, spot].detach().float().cpu()
                return x

            edits = [(self.hook, edit), steering.only((row, end))]
            with torch.set_grad_enabled(gradient is not None), steering.edited(self.lm, edits):
                out = self.lm(torch.nn.utils.rnn.pad_sequence(part, batch_first=True))[0].float()
            logits.append(out.detach().cpu())
            if gradient is not None:
                a, b = (g[at : at + len(row)].to(out.device) for g in gradient)
                (grad,) = torch.autograd.grad((out[row, a] - out[row, b]).sum(), seen["delta"])
                states.append(grad.float().cpu())
            else:
                states.append(seen["x"])
        return torch.cat(states), torch.cat(logits)

    def pairs(self, attribute: str, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """``n`` random (base, source) entities that differ in ``attribute``, [n] each."""
        rng, answer = np.random.default_rng(seed), self.answer[attribute]
        found = (answer[:, None] != answer).nonzero()  # [pairs, 2]
        base, source = found[torch.from_numpy(rng.permutation(len(found))[:n])].unbind(1)
        return base, source

    def gradients(self, n: int, seed: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """For each attribute n training pairs and ∂(logit source − logit base)/∂(base state): (base, source, [n, d])."""
        out = {}
        for a in self.attributes:
            base, source = self.pairs(a, n, seed)
            asked = [self.asked[a][b] for b in base]
            out[a] = (base, source, self._run(asked, gradient=(self.answer[a][source], self.answer[a][base]))[0])
        return out

    def answers(self, attribute: str, base: Tensor, states: Tensor) -> Tensor:
        """Restricted-choice answer (first token) to base prompts with ``states`` [n, d] where the entity ends."""
        logits = self._run([self.asked[attribute][b] for b in base], states)[1]
        options = self.options[attribute]
        return options[logits[:, options].argmax(1)]


@torch.no_grad()
def disentanglement(
    facts: Facts, sae: SAE, gradients: dict, n_pairs: int = 40, sizes: Sequence[int] = (8, 32, 128), seed: int = 1
) -> dict[str, float]:
    """(cause + isolation)/2: can the latents of one attribute be exchanged without touching the others?

    Latents of attribute A are exchanged between a base and a source prompt; on prompts for A the answer should become the
    source's (cause), on prompts for another attribute it should stay (isolation). As in SAEBench the state becomes
    decode(mixed latents), without the SAE's error. Its mask is learned by gradient descent on each latent; here latents
    are ranked by first-order effect on A less that on the others, their number chosen among ``sizes`` on training pairs.
    Exchanging everything or nothing scores .5.
    """
    door(sae=sae, n_pairs=n_pairs, seed=seed)
    acts = {a: sae.encode(x.to(sae.device, sae.dtype)).float() for a, x in facts.x.items()}  # [known, d_sae]

    def effect(a: str) -> Tensor:
        base, source, gradient = gradients[a]
        return (acts[a][source] - acts[a][base]) * (gradient.to(sae.W_dec) @ sae.W_dec.T).float()  # [n, d_sae]

    effects = {a: effect(a) for a in facts.attributes}

    def mixed(a: str, base: Tensor, source: Tensor, latents: Tensor) -> Tensor:
        f = acts[a][base].clone()
        f[:, latents] = acts[a][source][:, latents]
        return sae.decode(f.to(sae.dtype)).float()

    def score(a: str, latents: Tensor, seed: int) -> tuple[float, float]:
        base, source = facts.pairs(a, n_pairs, seed)
        cause = (facts.answers(a, base, mixed(a, base, source, latents)) == facts.answer[a][source]).float().mean()
        kept = []
        for other in facts.attributes:
            if other != a:
                base, source = facts.pairs(other, n_pairs // 2, seed)
                stays = facts.answers(other, base, mixed(other, base, source, latents)) == facts.answer[other][base]
                kept.append(stays.float().mean())
        return float(cause), float(torch.stack(kept).mean())

    rows = []
    for a in facts.attributes:
        others = torch.stack([effects[o].abs().mean(0) for o in facts.attributes if o != a]).mean(0)
        order = (effects[a].mean(0) - others).argsort(descending=True)
        best = max(sizes, key=lambda n, order=order, a=a: sum(score(a, order[:n], seed)))
        rows.append(score(a, order[:best], seed + 1))
    cause, isolation = np.mean(rows, axis=0)
    return {"score": float(cause + isolation) / 2, "cause": float(cause), "isolation": float(isolation)}
