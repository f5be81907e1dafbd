"""Bias Adaptation and Group Bias Adaptation (Chen et al. 2025, arXiv:2506.14002): biases set by rule, not by gradient.

Every latent has a target frequency, a ceiling. Its bias falls while it fires more often than that, rises while it never
fires; weights learn from the reconstruction alone. One group: Bias Adaptation; K groups: GBA.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAEConfig
from sae_lens.saes.sae import (
    SAEConfig,
    TrainCoefficientConfig,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
    TrainStepOutput,
)
from torch import Tensor, nn

from saeutils import metrics
from saeutils.kernels import sparse
from saeutils.kernels.door import door
from saeutils.saes import initializers
from saeutils.saes.base import SavedWhole, many_active, register


def geometric(highest: float, lowest: float, groups: int) -> list[float]:
    """Target frequencies of ``groups`` groups, evenly spaced on a log scale from ``highest`` (HTF) to ``lowest`` (LTF)."""
    door(highest=highest, lowest=lowest, groups=groups)
    return [highest * (lowest / highest) ** (i / max(1, groups - 1)) for i in range(groups)]


@dataclass
class GBATrainingSAEConfig(TrainingSAEConfig):
    """Settings of Group Bias Adaptation; rows are expected at norm 1 (``batches(normalise="l2")``).

    Args:
        frequencies: target firing rate of each group, falling; d_sae is divided among them evenly. One: Bias Adaptation.
        every: training steps between two updates of the biases.
        down, up: γ₋ and γ₊, the share of its largest (the group's mean largest) pre-activation by which a bias moves.
        silent: a latent that fired on a smaller share of rows than this counts as dead (ε).
    """

    frequencies: list[float] = field(default_factory=lambda: geometric(0.1, 1e-3, 10))
    every: int = 50
    down: float = 0.01
    up: float = 0.01
    silent: float = 1e-6
    decoder_init_norm: float | None = 1.0
    apply_b_dec_to_input: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        door(every=self.every, down=self.down, up=self.up, silent=self.silent)
        if not isinstance(self.frequencies, Sequence) or isinstance(self.frequencies, str):
            raise ValueError(f"frequencies={self.frequencies!r}: expected a falling list, see gba.geometric(highest, lowest, groups)")
        f = list(self.frequencies)
        if not f or not all(0 < p < 1 for p in f) or f != sorted(f, reverse=True):
            raise ValueError(
                f"frequencies={f} must fall, all between 0 and 1: see gba.geometric(highest, lowest, groups)"
            )
        if self.d_sae % len(f):
            raise ValueError(f"{len(f)} groups do not divide d_sae={self.d_sae}: take a multiple of {len(f)}")
        if self.normalize_activations != "none" or not self.apply_b_dec_to_input:
            raise ValueError(
                "gba takes rows of norm 1, less b_dec: normalize_activations='none', apply_b_dec_to_input=True"
            )

    @classmethod
    def architecture(cls) -> str:
        return "gba"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUSAEConfig

    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        return super().get_inference_sae_cfg_dict() | {"normalize_activations": "constant_norm_rescale"}


class GBATrainingSAE(SavedWhole, TrainingSAE[GBATrainingSAEConfig]):
    """x̂ = Σ_m a_m w_m φ(w_mᵀ(x − b_pre) + b_m) + b_pre with φ(y) = (y − b_m)·1[y > 0], ‖w_m‖ = 1; loss ½‖x̂ − x‖².

    φ gates without shrinking: the output is w_mᵀ(x − b_pre) wherever that exceeds −b_m, a JumpReLU of threshold −b_m.
    ``W_dec`` holds w, ``W_enc`` is its transpose, ``b_enc`` the biases (a buffer: no gradient), ``amplitude`` a. Counts and
    maxima since the last update are buffers too, so a checkpoint resumes exactly. Saved as an ordinary ``jumprelu`` SAE that
    scales each row itself. (The paper's AdamW decays weights; on rows kept at norm 1 that does nothing, ``train`` has Adam.)
    """

    unit_rows = True  # it takes rows of norm 1; its saved form scales rows itself

    def initialize_weights(self) -> None:
        d_sae, d_in, kind = self.cfg.d_sae, self.cfg.d_in, {"dtype": self.dtype, "device": self.device}
        self.W_dec = nn.Parameter(nn.functional.normalize(torch.randn(d_sae, d_in, **kind), dim=1))
        self.b_dec = nn.Parameter(torch.zeros(d_in, **kind))
        self.amplitude = nn.Parameter(torch.ones(d_sae, **kind))
        self.register_buffer("b_enc", torch.zeros(d_sae, **kind))
        for name, size in (("fired", d_sae), ("largest", d_sae), ("seen", 1)):  # float32: bf16 cannot count
            self.register_buffer(name, torch.zeros(size, device=self.device))

    @property
    def W_enc(self) -> Tensor:
        return self.W_dec.T

    @property
    def target(self) -> Tensor:
        """Target frequency of each latent, [d_sae]; from the settings, as SAELens loads onto a device without memory first."""
        groups = self.b_enc.new_tensor(self.cfg.frequencies)
        return groups.repeat_interleave(self.cfg.d_sae // len(groups))

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {}

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_dec.T)
        return self.hook_sae_acts_post(pre * (pre > -self.b_enc)), pre

    def decode(self, feature_acts: Tensor) -> Tensor:
        return self.reshape_fn_out(
            self.hook_sae_recons((feature_acts * self.amplitude) @ self.W_dec + self.b_dec), self.d_head
        )

    def calculate_aux_loss(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        return {}

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """As in SAELens, with ½‖x̂ − x‖²; the biases move every ``every`` steps, before the forward pass."""
        x, step = step_input.sae_in.to(self.dtype), step_input.n_training_steps
        self._require_normalised(x, step)
        if step and step % self.cfg.every == 0 and float(self.seen):
            self.adapt()
        if many_active(self, x):
            acts, pre = self.encode_with_hidden_pre(x)
            out = self.decode(acts)
            self.observe(pre.detach() + self.b_enc)
        else:
            zero = self.b_enc.new_zeros(self.cfg.d_sae)
            out, _, pre, row, column = sparse.Active.apply(
                x, self.W_dec.T, zero, self.amplitude[:, None] * self.W_dec, self.b_dec, -self.b_enc, 0.0, True
            )
            pre = pre.detach()
            self.observe((pre + self.b_enc[column]) * (pre > 0), column)
            acts = sparse.coo(row, column, pre, (len(x), self.cfg.d_sae))
        self.seen += len(x)
        mse = metrics.squared_error(out, x)
        return TrainStepOutput(x, out, acts, pre, mse / 2, {"mse_loss": mse})

    @torch.no_grad()
    def observe(self, y: Tensor, column: Tensor | None = None) -> None:
        """Count who fires and keep who fires most: pre-activations plus bias, [batch, d_sae] or the entries of ``column``."""
        active = y > 0
        if column is None:
            self.fired += active.sum(0)
            self.largest.copy_(torch.maximum(self.largest, y.amax(0).float()))
        else:
            self.fired += torch.bincount(column, active.to(torch.double), minlength=self.cfg.d_sae).to(self.fired)
            self.largest.scatter_reduce_(0, column, y.float(), "amax")

    @torch.no_grad()
    def adapt(self) -> None:
        """One update of the biases from the counts and maxima since the last, which are then cleared.

        With q_m the firing rate, r_m = max(max y, 0) and r̄_k the mean of the positive r of a group: q_m above the target
        p_k, b_m ← max(b_m − γ₋ r_m, −1); q_m below ε, b_m ← min(b_m + γ₊ r̄_k, 0). (A figure of the paper prints max in the
        second: a slip, it would clear every bias.) In a group where no latent fires, r̄_k is 1, the largest there can be.
        """
        rate = self.fired / self.seen
        r = self.largest.view(len(self.cfg.frequencies), -1)  # [groups, latents of a group]
        alive = (r > 0).sum(1)
        mean = torch.where(alive > 0, r.sum(1) / alive.clamp_min(1), 1.0).repeat_interleave(r.shape[1])
        lower = (self.b_enc - self.cfg.down * self.largest).clamp_min(-1)
        higher = (self.b_enc + self.cfg.up * mean).clamp_max(0)
        bias = torch.where(rate > self.target, lower, self.b_enc)
        self.b_enc.copy_(torch.where(rate < self.cfg.silent, higher, bias))
        for buffer in (self.fired, self.largest, self.seen):
            buffer.zero_()

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Start the biases where each latent fires at its target on rows ``x`` [n, d], in place of thousands of updates."""
        counts = (self.target * len(x)).round().long()  # rows to fire on, [d_sae]
        levels = initializers.firing_levels(self.process_sae_in(x.to(self.W_dec)), self.W_enc, counts)
        self.b_enc.copy_(-levels.clamp(0, 1))

    def _require_normalised(self, x: Tensor, step: int) -> None:
        if step:
            return
        norms = x.norm(dim=1)
        if float((norms - 1).abs().max()) > 1e-2:
            raise ValueError(
                f"rows have norms from {norms.min():.3g} to {norms.max():.3g}, gba needs 1: batches(normalise='l2')"
            )
        if len(x) > 1 and float(x.var(0).sum()) < 1e-8:
            raise ValueError("all rows are equal: nothing to recover")

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        for name in ("fired", "largest", "seen"):
            del state_dict[name]
        amplitude, bias, root = state_dict.pop("amplitude"), state_dict["b_enc"], self.cfg.d_in**0.5
        state_dict["W_enc"] = state_dict["W_dec"].T.contiguous() / root  # SAELens brings rows to norm √d
        state_dict["W_dec"] = root * amplitude[:, None] * state_dict["W_dec"]
        state_dict["b_dec"] = root * state_dict["b_dec"]
        state_dict["threshold"], state_dict["b_enc"] = -bias, torch.zeros_like(bias)


register("gba", GBATrainingSAE, GBATrainingSAEConfig)
