"""``train(sae, batches, …)``: SAELens' trainer plus what it lacks, with a pandas history."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from tqdm.auto import tqdm

from saeutils.kernels import memory, optim, ranks, traces
from saeutils.lm import provenance
from saeutils.metrics import orthogonality
from saeutils.saes import initializers
from saeutils.saes.base import aux_loss
from saeutils.training import checkpoints, checks, together
from saeutils.training.checks import Options
from saeutils.training.resampling import AT_ONCE, RESAMPLERS, reset_adam

VERSION = 1  # of the steps: raise it when the same run would give another SAE
RESAMPLE_FROM = 8192  # rows of recent batches from which resampled latents take their directions
WINDOW = 8  # batches among which ``orders`` shuffles rows


class _Trainer(SAETrainer):
    """SAELens' trainer with a fused optimiser, sparse bookkeeping, a history, and decoder rows kept at unit norm."""

    start: dict[str, list[float]]  # traces of the weights it began with, where there are checkpoints
    known: list[float]  # and of the last batch before the one that it went on from

    def __init__(self, name: str, cfg: SAETrainerConfig, sae: TrainingSAE, options: Options, folder: Path | None):
        memory.reuse()
        super().__init__(cfg, sae, iter(()))  # batches are handed to advance() one by one
        self.name, self.options, self.folder = name, options, folder
        self.aux_k = options.aux_k if options.dead == "aux_k" or isinstance(sae, TopKTrainingSAE) else 0.0
        self.clip = torch.ones((), device=cfg.device)  # the fused kernel divides gradients by it as it reads them
        self.optimizer.grad_scale, self.optimizer.found_inf = self.clip, torch.zeros((), device=cfg.device)
        optim.fuse(self.optimizer)
        self.fired = torch.zeros(sae.cfg.d_sae, device=cfg.device)  # rows each latent fired on since the last check
        self.seen = self.resampled = 0
        self.rows: list[dict] = []
        self.recent: deque[Tensor] = deque(maxlen=-(-RESAMPLE_FROM // cfg.train_batch_size_samples))
        self.generator = torch.Generator().manual_seed(options.seed)
        warm_up, decay = cfg.lr_warm_up_steps, cfg.lr_decay_steps
        settings = {  # a checkpoint goes on only with the same
            "version": VERSION,
            **{k: v for k, v in vars(options).items() if k not in ("log_every", "checkpoint_every", "callback")},
            "batch": cfg.train_batch_size_samples, "lr": cfg.lr, "betas": (cfg.adam_beta1, cfg.adam_beta2),
            "warm_up": warm_up, "decay": decay, "dead_window": cfg.dead_feature_window, **({"at_once": AT_ONCE} if options.dead == "anthropic" else {}),
        }  # fmt: skip
        self.settings = {name: checks.plain(value) for name, value in settings.items()}

    def advance(self, batch: Tensor) -> None:
        """One step, and whatever is due after it: resampling, a row of history, a checkpoint."""
        o = self.options
        if o.dead in RESAMPLERS:
            self.recent.append(batch)
        with together.unchanged_if_it_fails(self):
            output = self.step(ranks.part(batch))
        self.n_training_steps = done = self.n_training_steps + 1
        self.n_training_samples, self.last = done * len(batch), batch
        if o.dead in RESAMPLERS and done % o.dead_every == 0 and done <= o.dead_until * o.steps:
            self._resample()
        if done % o.log_every == 0 or done in (1, o.steps):
            self.rows.append(self._row(output))
            if o.callback:
                o.callback(done, self.sae, self.rows[-1])
        if self.folder and (done % o.checkpoint_every == 0 or done == o.steps) and ranks.rank() == 0:
            checkpoints.save(self.folder, self, batch)

    def _resample(self) -> None:
        silent = (self.fired / self.seen < self.options.dead_threshold).nonzero()[:, 0]
        recent = torch.cat(list(self.recent)).to(self.sae.device)
        redrawn = RESAMPLERS[self.options.dead](self.sae, silent, recent, self.generator)
        if self.options.dead == "anthropic":
            reset_adam(self.optimizer, self.sae, redrawn)
        self.resampled += len(redrawn)
        self.fired.zero_()
        self.seen = 0

    @torch.no_grad()
    def _row(self, output: TrainStepOutput) -> dict:
        x, acts = output.sae_in, output.feature_acts
        active = (acts._values() > 0).sum() if acts.is_sparse else (acts != 0).sum()
        here = {"loss": output.loss, **output.losses, "fvu": together.fvu(x, output.sae_out), "l0": float(active) / len(x)}
        measured = ranks.mean(torch.tensor([float(value) for value in here.values()], dtype=torch.double, device=x.device))
        return {
            **({"sae": self.name} if self.name else {}),
            "step": self.n_training_steps,
            "samples": self.n_training_samples,
            **dict(zip(here, measured.tolist())),
            "dead": float(self.dead_neurons.float().mean()),
            "orthogonality": orthogonality(self.sae.W_dec, rows=512)["mean"],
            "lr": self.optimizer.param_groups[0]["lr"],
            "resampled": self.resampled,
        }

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
                x, out = output.sae_in, output.sae_out
                output.losses["aux_k_loss"] = loss = aux_loss(sae, x, out, self.dead_neurons, self.aux_k)
                output.loss = output.loss + loss
        if not torch.isfinite(output.loss.detach()):
            raise ValueError(
                f"loss is {output.loss.item()} at step {self.n_training_steps}: NaN or inf in the activations, or lr too high"
            )
        output.loss.backward()
        ranks.average_gradients(sae.parameters())
        self._count(output.feature_acts)
        if self.options.unit_norm:
            optim.remove_parallel_gradient(sae.W_dec)
        norm = torch.stack([p.grad.norm() for p in sae.parameters() if p.grad is not None]).norm()
        self.clip.copy_(norm.clamp_min(1.0))  # gradient norm clipped at 1, as SAELens does
        with optim.row_major(self.optimizer):
            self.optimizer.step()
        self.optimizer.zero_grad()
        if self.options.unit_norm:
            optim.normalise_rows(sae.W_dec)
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        return output

    @torch.no_grad()
    def _count(self, acts: Tensor) -> None:
        if acts.is_sparse:
            indices, values = acts._indices()[1], acts._values()
            fired = torch.bincount(indices, (values > 0).double(), minlength=acts.shape[1]).float()
        else:
            fired = (acts != 0).sum(0).float()
        fired = ranks.total(fired)
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired[fired > 0] = 0
        self.act_freq_scores += fired
        self.n_frac_active_samples += acts.shape[0] * ranks.world()
        self.fired += fired
        self.seen += acts.shape[0] * ranks.world()


def train(
    sae: TrainingSAE | dict[str, TrainingSAE],
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
    orders: dict[str, int] | None = None,
) -> pd.DataFrame:
    """Train a SAELens training SAE, or several by name on one stream, in place.

    The history has one row for each ``log_every`` steps, the first and the last. Of several SAEs each takes its step on a
    batch before any takes the next, so the stream (and the LM behind it) is read once for all. The process keeps its freed
    memory from here on, see :mod:`saeutils.kernels.memory`. Under torchrun several processes train together, see
    :mod:`saeutils.training.together`: all give the same batches, and each takes its part of them.

    Columns: (sae, its name, where there are several,) step, samples, loss and every loss term, fvu, l0 (of that batch), dead (share of latents silent for
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
        checkpoint: folder for checkpoints (and in it one for each of several SAEs); a run that finds one goes on, on a CPU bit for
            bit, if its options, its start and the last batch that the checkpoint saw are the same.
        callback: called with (step, sae, history row) at every logged step.
        orders: seed by name: that SAE sees the rows of every WINDOW batches in an order of its own.

    Raises:
        ValueError: unknown ``dead``, k or width out of range, wrong batch width, NaN or inf, batches that end early; a
            checkpoint of other options, another start or other rows.
    """
    saes = sae if isinstance(sae, dict) else {"": sae}
    checks.require(
        saes, batches, dead, steps=steps, lr=lr, betas=betas, warm_up=warm_up, decay=decay, median_rows=median_rows, dead_window=dead_window, dead_every=dead_every,
        dead_until=dead_until, dead_threshold=dead_threshold, aux_k=aux_k, log_every=log_every, checkpoint_every=checkpoint_every, seed=seed,
    )  # fmt: skip
    steps, seed, lr, betas = int(steps), int(seed), checks.plain(lr), checks.plain(betas)
    size = WINDOW if orders else 1  # an order of its own is drawn for whole windows
    folders = {name: Path(checkpoint) / name for name in saes} if checkpoint else {}
    with checkpoints.alone(folders if ranks.rank() == 0 else {}):
        found = checkpoints.newest_of_all(folders)
        start = checkpoints.step_of(next(iter(found.values()))) if found else 0
        together.agree(start, list(saes), median_rows=median_rows, log_every=log_every, checkpoint_every=checkpoint_every)
        at = max(0, start - 1) // size * size  # the last batch that a checkpoint saw is read again: is it the same?
        made = batches(start=at) if callable(batches) else batches
        stream = iter(made) if callable(batches) else islice(iter(made), at, None)
        held = [checks.first(stream, saes)]
        if origin := getattr(made, "origin", None):
            for one in saes.values():
                provenance.record(one, origin)
        if not found and median_rows:
            while sum(map(len, held)) < median_rows and (batch := next(stream, None)) is not None:
                held.append(batch)
            median = ranks.of_first(initializers.geometric_median(torch.cat(held)[:median_rows]))
        device = next(iter(saes.values())).device
        cfg = SAETrainerConfig(
            total_training_samples=steps * len(held[0]), train_batch_size_samples=len(held[0]), lr=lr, lr_end=lr,
            lr_warm_up_steps=steps // 20 if warm_up is None else warm_up, lr_decay_steps=steps // 5 if decay is None else decay,
            adam_beta1=betas[0], adam_beta2=betas[1], device=str(device), dead_feature_window=dead_window,
        )  # fmt: skip
        options = Options(steps, unit_norm, median_rows, dead, dead_every, dead_until, dead_threshold, aux_k, log_every, checkpoint_every, callback, seed)
        trainers: list[_Trainer] = []
        for name, one in saes.items():
            began = traces.of(one) if folders else {}
            if not found and median_rows:
                one.b_dec.data.copy_(median)
            if not found and unit_norm:
                optim.normalise_rows(one.W_dec)
            asked = replace(options, order=orders[name]) if orders else options
            trainers.append(trainer := _Trainer(name, cfg, one, asked, folders.get(name)))
            together.require(trainer, held[0])
            trainer.start = began
            if found:
                checkpoints.restore(found[name], trainer)
        stream, held = chain(held, stream), None
        with tqdm(initial=start, total=steps, desc="training", disable=not progress or ranks.rank() > 0) as bar, together.saved_at_the_end(trainers):
            _run(trainers, stream, range(at, steps, size), start, found, orders, bar)
    for trainer in trainers:
        trainer.set_final_sae_metadata()
    return pd.DataFrame([row for trainer in trainers for row in trainer.rows])


def _run(
    trainers: list[_Trainer], stream: Iterator[Tensor], windows: range, start: int, found: dict[str, Path],
    orders: dict[str, int] | None, bar: tqdm,
) -> None:  # fmt: skip
    """All steps, a window of batches at a time; of those before ``start`` the last is compared with what the checkpoint saw."""
    size, steps = windows.step, windows.stop
    for step in windows:
        if len(window := list(islice(stream, size))) < min(size, steps - step):
            ended = f"batches ended after {step + len(window)} of {steps} steps"
            raise ValueError(f"{ended}: give an endless iterator or fewer steps")
        seen = [_reordered(window, orders[t.name], step // size) if orders else window for t in trainers]
        for trainer, own in zip(trainers, seen) if step < start else ():
            checkpoints.require_rows(found[trainer.name], trainer, own[start - 1 - step])
        for i in range(max(start - step, 0), min(size, steps - step)):
            together.stop_if_told(trainers[0])
            for trainer, own in zip(trainers, seen):
                trainer.advance(own[i])
            bar.update()


def _reordered(window: list[Tensor], seed: int, n: int) -> tuple[Tensor, ...]:
    """The rows of the ``n``-th window of batches, shuffled among them."""
    rows = torch.cat(window)
    order = np.random.default_rng([seed, n]).permutation(len(rows))
    return rows[torch.from_numpy(order)].split(len(window[0]))
