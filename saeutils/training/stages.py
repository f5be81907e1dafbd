"""The two stages of AlignSAE (arXiv:2512.02004): reconstruction alone, then with labels; slots that died are woken between."""

from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from saeutils.kernels.door import door
from saeutils.saes.alignsae import AlignTrainingSAE
from saeutils.training.loop import train


def labelled(
    saes: Iterable[AlignTrainingSAE], x: Tensor, relation: Tensor, answer: Tensor, batch: int, seed: int = 0
) -> Callable[..., Iterator[Tensor]]:
    """Endless shuffled batches of ``x`` [n, d]; the labels of each are set on every SAE as it leaves.

    Raises:
        ValueError: labels that do not match the rows, the slots or the value head.
    """
    door(x=x, batch=batch, seed=seed)
    saes = list(saes)
    if not len(x) == len(relation) == len(answer):
        raise ValueError(f"{len(x)} rows, {len(relation)} relations and {len(answer)} answers: one of each a row")
    for sae in saes:
        if relation.min() < 0 or relation.max() >= len(sae.cfg.slots):
            raise ValueError(
                f"relations run to {int(relation.max())}, the SAE has {len(sae.cfg.slots)} slots: {sae.cfg.slots}"
            )
        if sae.head is not None and answer.max() >= sae.cfg.answers:
            raise ValueError(f"answers run to {int(answer.max())}, the value head tells {sae.cfg.answers} apart")
    batch = min(batch, len(x))

    def batches(start: int = 0) -> Iterator[Tensor]:
        per_epoch = len(x) // batch
        for epoch in count(start // per_epoch):
            order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(x)))
            for n in range(start % per_epoch, per_epoch):
                rows = order[n * batch : (n + 1) * batch]
                for sae in saes:
                    sae.labels = relation[rows], answer[rows]
                yield x[rows]
            start = 0  # only the first epoch begins in its middle

    return batches


def fit(
    saes: dict[str, AlignTrainingSAE], x: Tensor, relation: Tensor, answer: Tensor, *, stages: tuple[int, int] = (120, 300),
    batch: int = 600, lr: float = 2e-3, seed: int = 0, checkpoint: str | Path | None = None, **settings,
) -> pd.DataFrame:  # fmt: skip
    """Both stages, in place, all SAEs on one stream: steps of reconstruction alone, then with the labels (section 2.2).

    Slots that stage 1 has left (nearly) dead are woken between the two, see :func:`wake`. ``settings`` go to
    :func:`saeutils.training.train`, whose history this returns with a column ``stage``.

    Args:
        x, relation, answer: rows [n, d] and, of each, which slot it belongs to and which answer it has, [n].
        stages: steps of the first and of the second stage.

    Raises:
        ValueError: ``orders`` (labels would lose their rows), or what ``labelled`` and ``train`` refuse.
    """
    door(saes=saes, x=x, stages=stages, batch=batch, lr=lr, seed=seed)
    seed = int(seed)
    if settings.get("orders"):
        raise ValueError("orders shuffles rows away from their labels: leave it out")
    batches = labelled(saes.values(), x, relation, answer, batch, seed)

    def unlabelled(start: int = 0) -> Iterator[Tensor]:
        for rows in batches(start):
            for sae in saes.values():
                sae.labels = None
            yield rows

    parts = []
    for stage, (stream, steps, rows) in enumerate(zip((unlabelled, batches), stages, (16_384, 0)), start=1):
        if not steps:
            continue
        if stage == 2:
            for sae in saes.values():
                wake(sae, x, relation)
        folder = {"checkpoint": Path(checkpoint) / f"stage-{stage}"} if checkpoint else {}
        history = train(saes, stream, steps, lr=lr, median_rows=rows, seed=seed, **folder, **settings)
        parts.append(history.assign(stage=stage, step=history["step"] + (stages[0] if stage == 2 else 0)))
    for sae in saes.values():
        sae.labels = None
    return pd.concat(parts, ignore_index=True)


@torch.no_grad()
def wake(sae: AlignTrainingSAE, x: Tensor, relation: Tensor, share: float = 0.1) -> list[str]:
    """Redraw slots that fire on less than ``share`` of their concept's rows x [n, d], in place; returns their names.

    A silent ReLU passes no gradient, so a slot that died in stage 1 can never be bound (not in the paper, whose code has
    linear codes). It gets the direction from the mean of all rows to its concept's, for encoder and decoder.
    """
    door(sae=sae, x=x, share=share)
    woken = []
    for i, name in enumerate(sae.cfg.slots if sae.cfg.bind else []):
        if i < sae.frozen:
            continue
        own = x[relation == i].to(sae.W_enc)
        if len(own) and float(((own - sae.b_dec) @ sae.W_enc[:, i] + sae.b_enc[i] > 0).float().mean()) < share:
            direction = F.normalize(own.mean(0) - x.to(own).mean(0), dim=0)
            sae.W_enc[:, i] = sae.W_dec[i] = direction
            sae.b_enc[i] = 0
            woken.append(name)
    return woken
