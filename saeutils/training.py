"""``train(sae, batches, …)``: SAELens' trainer plus what it lacks, with a pandas history."""

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from tqdm.auto import tqdm

from saeutils import archives, initializers
from saeutils.metrics import fvu, orthogonality
from saeutils.resampling import RESAMPLERS, reset_adam
from saeutils.saes import aux_k_loss

DEAD = ("none", "post", "anthropic", "aux_k")
RESAMPLE_FROM = 8192  # rows of recent batches from which resampled latents take their directions
CHUNK = 512  # decoder rows handled at a time, so that gradient and weights meet in the processor's cache


class _Trainer(SAETrainer):
    """SAELens' trainer with a fused optimiser, sparse bookkeeping, and decoder rows kept at unit norm."""

    def __init__(
        self, cfg: SAETrainerConfig, sae: TrainingSAE, batches: Iterator[Tensor], unit_norm: bool, aux_k: float
    ):
        super().__init__(cfg, sae, batches)
        self.unit_norm, self.aux_k = unit_norm, aux_k
        self.clip = torch.ones((), device=cfg.device)  # the fused kernel divides gradients by it as it reads them
        for group in self.optimizer.param_groups:
            group["fused"], group["foreach"] = True, False
        self.optimizer.grad_scale, self.optimizer.found_inf = self.clip, torch.zeros((), device=cfg.device)
        self.fired = torch.zeros(
            sae.cfg.d_sae, device=cfg.device
        )  # rows on which each latent fired since the last check
        self.seen = 0

    def _train_step(self, sae: TrainingSAE, sae_in: Tensor) -> TrainStepOutput:
        sae.train()
        with self.autocast_if_enabled:
            output = sae.training_forward_pass(
                TrainStepInput(
                    sae_in=sae_in,
                    dead_neuron_mask=self.dead_neurons if self.aux_k else None,
                    coefficients=self.get_coefficients(),
                    n_training_steps=self.n_training_steps,
                    is_logging_step=False,
                )
            )
            if self.aux_k and not isinstance(sae, TopKTrainingSAE) and bool(self.dead_neurons.any()):
                self._add_aux_k(output)
        if not torch.isfinite(output.loss.detach()):
            raise ValueError(
                f"loss is {output.loss.item()} at step {self.n_training_steps}: NaN or inf in the activations, or lr too high"
            )
        self._count(output.feature_acts)
        output.loss.backward()
        if self.unit_norm:
            remove_parallel_gradient(sae.W_dec)
        norm = torch.stack([p.grad.norm() for p in sae.parameters() if p.grad is not None]).norm()
        self.clip.copy_(norm.clamp_min(1.0))  # gradient norm clipped at 1, as SAELens does
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.unit_norm:
            normalise_rows(sae.W_dec)
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        return output

    def _add_aux_k(self, output: TrainStepOutput) -> None:
        sae, dead = self.sae, self.dead_neurons.nonzero()[:, 0]
        sae_in = output.sae_in - sae.b_dec if sae.cfg.apply_b_dec_to_input else output.sae_in
        pre = sae_in @ sae.W_enc[:, dead] + sae.b_enc[dead]  # [batch, n_dead]
        residual = (output.sae_in - output.sae_out).detach()
        loss = self.aux_k * aux_k_loss(pre, sae.W_dec[dead], residual, len(dead))
        output.losses["aux_k_loss"] = loss
        output.loss = output.loss + loss

    @torch.no_grad()
    def _count(self, acts: Tensor) -> None:
        if acts.is_sparse:
            indices, values = acts._indices()[1], acts._values()
            fired = torch.bincount(indices, (values > 0).double(), minlength=acts.shape[1]).float()
        else:
            fired = (acts != 0).sum(0).float()
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired[fired > 0] = 0
        self.act_freq_scores += fired
        self.n_frac_active_samples += acts.shape[0]
        self.fired += fired
        self.seen += acts.shape[0]


@torch.no_grad()
def remove_parallel_gradient(W_dec: Tensor) -> None:
    """Project each row's gradient onto the tangent of its unit sphere: g ← g − (g·w)w (Bricken et al. 2023)."""
    for grad, row in zip(W_dec.grad.split(CHUNK), W_dec.split(CHUNK)):
        grad.sub_((grad * row).sum(1, keepdim=True) * row)


@torch.no_grad()
def normalise_rows(W_dec: Tensor) -> None:
    """Every row back to norm 1, in place."""
    for row in W_dec.split(CHUNK):
        row.div_(row.norm(dim=1, keepdim=True).clamp_min(1e-8))


def train(
    sae: TrainingSAE,
    batches: Iterable[Tensor] | Callable[..., Iterator[Tensor]],
    steps: int,
    *,
    lr: float = 3e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    warm_up: int | None = None,
    decay: int | None = None,
    unit_norm: bool = True,
    median_rows: int = 16_384,
    dead: str = "none",
    dead_window: int = 200,
    dead_every: int = 500,
    dead_until: float = 0.8,
    dead_threshold: float = 1e-5,
    aux_k: float = 1 / 32,
    log_every: int = 10,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    callback: Callable[[int, TrainingSAE, dict], None] | None = None,
    progress: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """Train any SAELens training SAE in place; the history has one row for each ``log_every`` steps, the first and the last.

    Columns: step, samples, loss and every loss term, fvu, l0 (of that batch), dead (share of latents silent for
    ``dead_window`` steps), orthogonality (mean |cos| of decoder rows, from 512 rows), lr, resampled (latents so far).

    Args:
        batches: [batch, d_in] tensors of one size, or a function ``start=step → iterator`` such as
            ``functools.partial(acts.batches, 4096)``, which a resumed run need not replay.
        warm_up, decay: steps of linear rise from 0 and linear fall to 0; default 5% and 20% of ``steps``.
        unit_norm: keep decoder rows at norm 1, their gradients tangential.
        median_rows: start ``b_dec`` at the geometric median of the first so many rows; 0 leaves it alone.
        dead: ``none``; ``post`` (re-draw encoder rows) or ``anthropic`` (re-draw from badly reconstructed inputs), both
            every ``dead_every`` steps up to the share ``dead_until`` of the run, for latents that fired on fewer than
            ``dead_threshold`` of the rows since; ``aux_k`` (auxiliary loss, weight ``aux_k``). TopK classes
            always have their own; ``aux_loss_coefficient=0`` in their config turns it off.
        checkpoint: folder for checkpoints; a run that finds one goes on from it, on a CPU bit for bit.
        callback: called with (step, sae, history row) at every logged step.

    Raises:
        ValueError: unknown ``dead``, k or width out of range, wrong batch width, NaN or inf, batches that end early.
    """
    if dead not in DEAD:
        raise ValueError(f"unknown dead={dead!r}: one of {DEAD}")
    warm_up = steps // 20 if warm_up is None else warm_up
    decay = steps // 5 if decay is None else decay
    folder = Path(checkpoint) if checkpoint else None
    found = _newest_checkpoint(folder) if folder else None
    start = int(found.name.split("-")[1]) if found else 0
    stream = iter(batches(start=start)) if callable(batches) else islice(iter(batches), start, None)
    first = _checked(stream, sae)
    cfg = SAETrainerConfig(
        total_training_samples=steps * len(first), train_batch_size_samples=len(first), lr=lr, lr_end=lr,
        lr_warm_up_steps=warm_up, lr_decay_steps=decay, adam_beta1=betas[0], adam_beta2=betas[1],
        device=str(sae.device), dead_feature_window=dead_window,
    )  # fmt: skip
    held = [first]
    if not found and median_rows:
        while sum(map(len, held)) < median_rows and (batch := next(stream, None)) is not None:
            held.append(batch)
        initializers.decoder_bias_at_median(sae, torch.cat(held)[:median_rows].to(sae.device))
    if not found and unit_norm:
        normalise_rows(sae.W_dec)
    use_aux = dead == "aux_k" or isinstance(sae, TopKTrainingSAE)
    trainer = _Trainer(cfg, sae, stream, unit_norm, aux_k if use_aux else 0.0)
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict] = []
    recent: deque[Tensor] = deque(maxlen=-(-RESAMPLE_FROM // len(first)))
    settings = {
        "steps": steps,
        "batch": len(first),
        "lr": lr,
        "warm_up": warm_up,
        "decay": decay,
        "dead": dead,
        "seed": seed,
    }
    resampled = _restore(found, trainer, generator, rows, recent, settings) if found else 0
    for step in tqdm(range(start, steps), initial=start, total=steps, desc="training", disable=not progress):
        batch = held.pop(0) if held else next(stream, None)
        if batch is None:
            raise ValueError(f"batches ended after {step} of {steps} steps: give an endless iterator or fewer steps")
        recent.append(batch)
        output = trainer.step(batch)
        trainer.n_training_steps = done = step + 1
        if dead in RESAMPLERS and done % dead_every == 0 and done <= dead_until * steps:
            silent = (trainer.fired / trainer.seen < dead_threshold).nonzero()[:, 0]
            redrawn = RESAMPLERS[dead](sae, silent, torch.cat(list(recent)).to(sae.device), generator)
            if dead == "anthropic":
                reset_adam(trainer.optimizer, sae, redrawn)
            resampled += len(redrawn)
            trainer.fired.zero_()
            trainer.seen = 0
        if done % log_every == 0 or done in (1, steps):
            rows.append(_row(trainer, output, resampled))
            if callback:
                callback(done, sae, rows[-1])
        if folder and (done % checkpoint_every == 0 or done == steps):
            _save(folder, trainer, generator, rows, recent, {**settings, "resampled": resampled})
    trainer.set_final_sae_metadata()
    return pd.DataFrame(rows)


def _checked(stream: Iterator[Tensor], sae: TrainingSAE) -> Tensor:
    first = next(stream, None)
    if first is None:
        raise ValueError("batches is empty")
    if first.ndim != 2 or first.shape[1] != sae.cfg.d_in:
        raise ValueError(f"batches are {tuple(first.shape)}, the SAE expects [batch, {sae.cfg.d_in}]: same hook point?")
    if not torch.isfinite(first).all():
        raise ValueError("the first batch has NaN or inf: collect the activations in float32 or bfloat16")
    return first


@torch.no_grad()
def _row(trainer: _Trainer, output: TrainStepOutput, resampled: int) -> dict:
    x, acts = output.sae_in, output.feature_acts
    active = (acts._values() > 0).sum() if acts.is_sparse else (acts != 0).sum()
    return {
        "step": trainer.n_training_steps,
        "samples": trainer.n_training_samples,
        "loss": float(output.loss.detach()),
        **{name: float(value) for name, value in output.losses.items()},
        "fvu": fvu(x, output.sae_out),
        "l0": float(active) / len(x),
        "dead": float(trainer.dead_neurons.float().mean()),
        "orthogonality": orthogonality(trainer.sae.W_dec, rows=512)["mean"],
        "lr": trainer.optimizer.param_groups[0]["lr"],
        "resampled": resampled,
    }


def _save(
    folder: Path, trainer: _Trainer, generator: torch.Generator, rows: list[dict], recent: deque, settings: dict
) -> None:
    """Write ``step-N`` under a temporary name, hash it, rename it; keep the newest two."""
    tmp = folder / ".saving"
    shutil.rmtree(tmp, ignore_errors=True)
    trainer.sae.save_model(tmp)
    trainer.save_trainer_state(tmp)
    extra = {"generator": generator.get_state(), "fired": trainer.fired, "seen": trainer.seen, **settings}
    if settings["dead"] == "anthropic":
        extra["recent"] = list(recent)
    torch.save(extra, tmp / "extra.pt")
    (tmp / "history.json").write_text(json.dumps(rows))
    hashes = {f.name: archives.sha256_of(f) for f in sorted(tmp.iterdir())}
    (tmp / "sha256.json").write_text(json.dumps(hashes))
    shutil.rmtree(final := folder / f"step-{trainer.n_training_steps:08d}", ignore_errors=True)
    os.replace(tmp, final)
    for old in sorted(folder.glob("step-*"))[:-2]:
        shutil.rmtree(old)


def _newest_checkpoint(folder: Path) -> Path | None:
    for path in sorted(folder.glob("step-*"), reverse=True):
        recorded = path / "sha256.json"
        hashes = json.loads(recorded.read_text()) if recorded.exists() else {}
        if hashes and all((path / f).exists() and archives.sha256_of(path / f) == h for f, h in hashes.items()):
            return path
        print(f"{path} is damaged: taking the one before it")
    return None


def _restore(
    path: Path, trainer: _Trainer, generator: torch.Generator, rows: list[dict], recent: deque, settings: dict
) -> int:
    saved = json.loads((path / "cfg.json").read_text())
    extra = torch.load(path / "extra.pt", weights_only=True)
    changed = [k for k in ("d_in", "d_sae", "k") if saved.get(k) != getattr(trainer.sae.cfg, k, None)]
    if changed := changed + [k for k, v in settings.items() if extra[k] != v]:
        raise ValueError(f"{path} was trained with another {', '.join(changed)}: give another checkpoint folder")
    trainer.sae.load_weights_from_checkpoint(path)
    trainer.load_trainer_state(path)
    for group in trainer.optimizer.param_groups:
        group["fused"], group["foreach"] = True, False
    recent.extend(extra.get("recent", []))
    generator.set_state(extra["generator"])
    trainer.fired, trainer.seen = extra["fired"], extra["seen"]
    rows.extend(json.loads((path / "history.json").read_text()))
    return extra["resampled"]
