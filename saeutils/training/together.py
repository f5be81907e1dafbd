"""One SAE trained by several processes (torchrun): what all must share, and what happens when one of them dies.

Each reads the same batches and takes its part of every one; gradients are averaged and latents counted over all, so all
hold the same weights after every step, and process 0 writes the checkpoints. Gradients of an SAE come out of one function
(:mod:`saeutils.kernels.sparse`) all at once: there is nothing that DistributedDataParallel's buckets could overlap with.

Where a process dies, the others end with a checkpoint of the last whole step: so on gloo. NCCL tells nobody, its processes
are killed by torchrun while they wait; there the checkpoints of every ``checkpoint_every`` steps are what remains.
"""

import hashlib
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from saeutils import metrics
from saeutils.kernels import ranks
from saeutils.saes.batchtopk import SparseBatchTopKTrainingSAE
from saeutils.saes.jumprelu import SparseJumpReLUTrainingSAE
from saeutils.saes.standard import SparseStandardTrainingSAE
from saeutils.saes.topk import SparseTopKTrainingSAE
from saeutils.training import checkpoints

KNOWN = (SparseTopKTrainingSAE, SparseBatchTopKTrainingSAE, SparseJumpReLUTrainingSAE, SparseStandardTrainingSAE)
_TOLD = threading.Event()  # the system has asked this process to end


def agree(start: int, saes: list[str], **options) -> None:
    """What must be alike before the first exchange: where they go on from, how many SAEs, when they measure.

    Raises:
        ValueError: it differs between the processes.
    """
    ranks.require_alike({"the step they go on from": start, "SAEs": saes, **options})


def require(trainer, batch: Tensor) -> None:
    """All processes came with the same options, weights and rows, and their number divides the batch.

    Raises:
        ValueError: they did not; an SAE whose step looks at the whole batch in a way of its own (GBA, AlignSAE).
    """
    if ranks.world() == 1:
        return
    if type(trainer.sae) not in KNOWN:
        names = ", ".join(kind.__name__ for kind in KNOWN)
        raise ValueError(f"{type(trainer.sae).__name__} cannot be trained by several processes; these can: {names}")
    if len(batch) % ranks.world():
        raise ValueError(f"batches of {len(batch):,} rows cannot be divided among {ranks.world()} processes: take a multiple")
    weights = {name: _hash(p) for name, p in trainer.sae.named_parameters()}
    ranks.require_alike({**trainer.settings, "weights": weights, "rows": _hash(batch)})


def _hash(x: Tensor) -> str:
    return hashlib.sha256(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def fvu(x: Tensor, reconstruction: Tensor) -> float:
    """:func:`saeutils.metrics.fvu` of all processes' rows."""
    if ranks.world() == 1:
        return metrics.fvu(x, reconstruction)
    centre = ranks.mean(x.float().mean(0))
    errors = ranks.total((x - reconstruction).float().pow(2).sum())
    return float(errors / ranks.total((x.float() - centre).pow(2).sum()))


@contextmanager
def unchanged_if_it_fails(trainer) -> Iterator[None]:
    """A step whose exchange with the others fails leaves buffers as they were; weights change only behind the last exchange."""
    if ranks.world() == 1:
        yield
        return
    before = {name: b.clone() for name, b in trainer.sae.named_buffers()}
    try:
        yield
    except RuntimeError:
        for name, buffer in trainer.sae.named_buffers():
            buffer.copy_(before[name])
        raise


def stop_if_told(trainer) -> None:
    """All stop at the same step, if one was asked to end (SIGTERM, as torchrun does when another has died).

    Raises:
        Broken: one was, or is gone.
    """
    if ranks.world() > 1 and float(ranks.total(trainer.clip.new_tensor(float(_TOLD.is_set())))):
        raise ranks.Broken("asked to end")


@contextmanager
def saved_at_the_end(trainers: list) -> Iterator[None]:
    """Where another process dies in the block, this one ends with a checkpoint of the last whole step and a sentence.

    Raises:
        RuntimeError: that sentence.
    """
    if ranks.world() == 1:
        yield
        return
    _TOLD.clear()
    before = signal.signal(signal.SIGTERM, lambda *_: _TOLD.set())
    try:
        yield
        ranks.meet()  # the last checkpoint is there for all
    except ranks.Broken as error:
        done, kept = trainers[0].n_training_steps, _save(trainers)
        what = f"one of the {ranks.world()} processes died, or was asked to end, after step {done:,}"
        why = str(error).splitlines()[0][:120]
        raise RuntimeError(f"{what}; {kept} ({why})") from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _save(trainers: list) -> str:
    """Process 0 writes; should it be the dead one, whoever of the others gets its lock. Says what is there now."""
    folders = {t.name: t.folder for t in trainers if t.folder}
    steps = {t.n_training_steps for t in trainers}
    with checkpoints.alone({} if ranks.rank() == 0 else folders):
        for trainer in trainers if folders and len(steps) == 1 and steps != {0} else ():
            there = checkpoints.newest(trainer.folder)
            if there is None or checkpoints.step_of(there) < trainer.n_training_steps:
                checkpoints.save(trainer.folder, trainer, trainer.last)
        found = checkpoints.newest_of_all(folders)
    if not found:
        return "nothing is saved: train was given no checkpoint folder, or had not come to one"
    return f"saved is step {checkpoints.step_of(next(iter(found.values()))):,}: the same command goes on from there"
