"""AlignSAE (arXiv:2512.02004): an SAE whose first latents, the slots, are bound to concepts by supervision.

Stage 1 trains an ordinary ReLU SAE; stage 2 adds three losses on the slots. The rest of the dictionary, the free bank,
goes on reconstructing.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import torch
from sae_lens import registry
from sae_lens.saes.sae import SAE, SAEConfig, TrainStepInput
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from torch import Tensor, nn

from saeutils.kernels.door import door, optionally
from saeutils.saes.alignlosses import bind_loss, decorrelation, sparse_decorrelation, value_loss
from saeutils.saes.base import SavedWhole, register
from saeutils.saes.standard import SparseStandardTrainingSAE, SparseStandardTrainingSAEConfig


def _top(pre: Tensor, slots: int, k: int | None) -> Tensor:
    """ReLU; of the free bank only the k largest of each row, where k is given."""
    acts = pre.relu()
    if k is None or k >= pre.shape[-1] - slots:
        return acts
    best = acts[..., slots:].topk(k, dim=-1)
    kept = torch.zeros_like(acts[..., slots:]).scatter(-1, best.indices, best.values)
    return torch.cat([acts[..., :slots], kept], dim=-1)


@dataclass
class AlignSAEConfig(StandardSAEConfig):
    """An AlignSAE with a TopK free bank; without TopK it is saved as an ordinary ``standard`` SAE."""

    slots: list[str] = field(default_factory=list)
    free_k: int | None = None

    @classmethod
    def architecture(cls) -> str:
        return "alignsae"


class AlignSAE(SavedWhole, StandardSAE):
    """z = [ReLU(pre)_slots ; TopK(ReLU(pre)_free)], linear decoder."""

    def encode(self, x: Tensor) -> Tensor:
        pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        return self.hook_sae_acts_post(_top(pre, len(self.cfg.slots), self.cfg.free_k))


@dataclass
class AlignTrainingSAEConfig(SparseStandardTrainingSAEConfig):
    """Settings of an AlignSAE; inputs are expected at mean norm √d (``Activations.scale``), decoder rows at norm 1.

    Args:
        slots: names of the concepts; slot i is latent i.
        answers: how many different answers the value head tells apart; 0: no head.
        bind, decorrelate, value: weights of the three losses of stage 2, all 0 for a plain SAE.
        free_k: active latents of the free bank, in training and after; None: ReLU alone.
    """

    slots: list[str] = field(default_factory=list)
    answers: int = 0
    bind: float = 20.0
    decorrelate: float = 0.5
    value: float = 0.02
    free_k: int | None = None
    l1_coefficient: float = 0.05
    decoder_init_norm: float | None = 1.0
    apply_b_dec_to_input: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        door(slots=self.slots, answers=self.answers, bind=self.bind, decorrelate=self.decorrelate)
        if not isinstance(self.value, Real) or not 0 <= self.value < math.inf:
            raise ValueError(f"value={self.value!r}: expected a weight of at least 0")
        optionally(free_k=self.free_k)
        if not 2 <= len(self.slots) < self.d_sae or len(set(self.slots)) < len(self.slots):
            raise ValueError(f"slots={self.slots}: give at least two different names, fewer than d_sae={self.d_sae}")
        if self.free_k is not None and not 0 < self.free_k <= self.d_sae - len(self.slots):
            raise ValueError(
                f"free_k={self.free_k} must lie between 1 and the {self.d_sae - len(self.slots)} free latents"
            )

    @classmethod
    def architecture(cls) -> str:
        return "alignsae"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return AlignSAEConfig if self.free_k else StandardSAEConfig


class AlignTrainingSAE(SparseStandardTrainingSAE):
    """Stage 1 while ``labels`` is None: ‖h − ĥ‖² + λ_sp‖z‖₁. Stage 2 adds binding, decorrelation and value losses.

    ``labels``: (relation [batch], answer [batch]) of the batch that comes next; :func:`labelled` sets it. The penalty on
    correlation moves the free bank only: the slots enter it as constants, or they would shrink to please it.
    """

    labels: tuple[Tensor, Tensor] | None = None
    frozen: int = 0  # the first so many slots keep their weights

    def __init__(self, cfg: AlignTrainingSAEConfig, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        cfg.metadata.slots = list(cfg.slots)
        self.head = (
            nn.Linear(len(cfg.slots), cfg.answers, device=self.device, dtype=self.dtype) if cfg.answers else None
        )

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        return self.hook_sae_acts_post(_top(pre, len(self.cfg.slots), self.cfg.free_k)), pre

    @property
    def dense_only(self) -> bool:
        """The sparse pass knows no TopK free bank."""
        return super().dense_only or self.cfg.free_k is not None

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        losses = super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        slots, free = feature_acts[:, : len(self.cfg.slots)], feature_acts[:, len(self.cfg.slots) :]
        return losses | self._supervised(slots, lambda: decorrelation(slots.detach(), free))

    def sparse_losses(
        self, step_input: TrainStepInput, values: Tensor, row: Tensor, column: Tensor
    ) -> dict[str, Tensor]:
        losses, n = super().sparse_losses(step_input, values, row, column), len(self.cfg.slots)
        bound, free = (column < n).nonzero()[:, 0], (column >= n).nonzero()[:, 0]
        slots = values.new_zeros(len(step_input.sae_in), n).index_put((row[bound], column[bound]), values[bound])
        parts = values[free], row[free], column[free] - n, self.cfg.d_sae - n
        return losses | self._supervised(slots, lambda: sparse_decorrelation(slots.detach(), *parts))

    def _supervised(self, slots: Tensor, correlation: Callable[[], Tensor]) -> dict[str, Tensor]:
        """The losses of stage 2; slots [batch, R]."""
        losses, cfg = {}, self.cfg
        if self.labels is None:
            return losses
        relation, answer = (y.to(slots.device) for y in self.labels)
        if cfg.bind:
            losses["bind_loss"] = cfg.bind * bind_loss(slots, relation)
        if cfg.decorrelate:
            losses["decorrelation_loss"] = cfg.decorrelate * correlation()
        if cfg.value and self.head is not None:
            losses["value_loss"] = cfg.value * value_loss(slots, self.head, answer)
        return losses

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        for name in [n for n in state_dict if n.startswith("head.")]:
            del state_dict[name]


if "alignsae" not in registry.SAE_CLASS_REGISTRY:
    registry.register_sae_class("alignsae", AlignSAE, AlignSAEConfig)
register("alignsae", AlignTrainingSAE, AlignTrainingSAEConfig)


def slot(sae: SAE, name: str) -> int:
    """The latent bound to a concept.

    Raises:
        ValueError: the SAE has no slots, or none of that name.
    """
    door(sae=sae, name=name)
    names = sae.cfg.metadata.slots or []
    if name not in names:
        raise ValueError(f"no slot {name!r}; the SAE has {names or 'none: train it with saeutils.saes.alignsae'}")
    return names.index(name)


def extended(
    sae: AlignTrainingSAE, names: Sequence[str], answers: int = 0, freeze: bool = True, seed: int = 0
) -> AlignTrainingSAE:
    """A copy with slots for new concepts: the first free latents become slots, the value head is new.

    With ``freeze`` the old slots stay the functions that they are: their weights and ``b_dec`` take no gradient.
    """
    door(sae=sae, seed=seed, answers=answers)
    old = len(sae.cfg.slots)
    cfg = replace(sae.cfg, slots=[*sae.cfg.slots, *names], answers=answers, metadata=copy.deepcopy(sae.cfg.metadata))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        new = AlignTrainingSAE(cfg)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        getattr(new, name).data.copy_(getattr(sae, name).data)
    if freeze:
        new.frozen = old
        new.W_enc.register_hook(lambda g: torch.cat([torch.zeros_like(g[:, :old]), g[:, old:]], dim=1))
        for weight in (new.b_enc, new.W_dec):
            weight.register_hook(lambda g: torch.cat([torch.zeros_like(g[:old]), g[old:]]))
        new.b_dec.register_hook(torch.zeros_like)
    return new


@torch.no_grad()
def swap(sae: SAE, h: Tensor, source: Tensor, target: Tensor, value: Tensor) -> Tensor:
    """What a concept swap adds to ``h`` [n, d]: latent ``source`` [n] set to 0, ``target`` [n] to ``value`` [n], decoded.

    The difference of the two decodes, so the SAE's error stays in place.
    """
    door(sae=sae, h=h)
    z = sae.encode(h.to(sae.device, sae.dtype))
    changed, row = z.clone(), torch.arange(len(z), device=z.device)
    changed[row, source.to(z.device)] = 0
    changed[row, target.to(z.device)] = value.to(z)
    return ((changed - z) @ sae.W_dec).float().to(h.device)
