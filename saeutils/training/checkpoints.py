"""Checkpoints of a training run: written whole or not at all, hashed, read back bit for bit."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from saeutils.kernels import files, optim, traces

FIX = "give another checkpoint folder, or delete this one"
STATE = ("fired", "seen", "resampled", "n_training_steps")


def save(folder: Path, trainer, batch: Tensor) -> None:
    """Write ``step-N`` under a temporary name, hash it, rename it; keep the newest two. ``batch``: the last one seen."""
    with files.whole_folder(folder / f"step-{trainer.n_training_steps:08d}", again=True) as tmp:  # it may be there, damaged
        _write(tmp, trainer, batch)
    for old in sorted(folder.glob("step-*"))[:-2]:
        shutil.rmtree(old)


@contextmanager
def alone(folders: dict[str, Path]) -> Iterator[None]:
    """One process at a time trains into these folders; what killed ones left half-written is cleared away."""
    with ExitStack() as held:
        for folder in folders.values():
            held.enter_context(files.lock("training run", str(folder.resolve())))
            files.sweep(folder)
        yield


def _write(tmp: Path, trainer, batch: Tensor) -> None:
    trainer.sae.save_model(tmp)
    trainer.save_trainer_state(tmp)
    extra = {name: getattr(trainer, name) for name in STATE} | trainer.settings
    extra |= {"start": trainer.start, "rows": traces.trace(batch)}
    extra["generator"] = trainer.generator.get_state()
    if trainer.settings["dead"] == "anthropic":
        extra["recent"] = list(trainer.recent)
    torch.save(extra, tmp / "extra.pt")
    (tmp / "history.json").write_text(json.dumps(trainer.rows))
    files.seal(tmp)


def step_of(path: Path) -> int:
    """The step at which a checkpoint was written."""
    return int(path.name.split("-")[1])


def newest(folder: Path, at_most: int | None = None) -> Path | None:
    """The newest whole checkpoint in ``folder``, of step ``at_most`` or before; what is damaged is passed over."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        if at_most is not None and step_of(path) > at_most:
            continue
        if files.sealed(path):
            return path
        print(f"{path} is damaged: taking the one before it")
    return None


def newest_of_all(folders: dict[str, Path]) -> dict[str, Path]:
    """A whole checkpoint in every folder, all of one step, the newest there is; empty if there is none."""
    at_most = None
    while folders:
        found = {name: newest(folder, at_most) for name, folder in folders.items()}
        if None in found.values():
            break
        steps = {step_of(path) for path in found.values()}
        if len(steps) == 1:
            return found
        at_most = min(steps)
    return {}


def restore(path: Path, trainer) -> None:
    """Put ``trainer`` where it was when it wrote ``path``; :func:`require_rows` is for when its batches come.

    Raises:
        ValueError: the checkpoint was written under other settings, or began from other weights.
    """
    saved = json.loads((path / "cfg.json").read_text())
    extra = torch.load(path / "extra.pt", weights_only=True, map_location="cpu")  # it may come from another device
    cfg = json.loads(json.dumps(trainer.sae.cfg.to_dict()))
    changed = [k for k, v in saved.items() if k not in ("metadata", "device", "dtype") and cfg.get(k, v) != v]
    changed += [k for k, v in trainer.settings.items() if extra.get(k, v is None) != v]
    if not traces.all_alike(extra.get("start", {}), trainer.start):
        changed.append("start (the weights that the SAE came with)")
    if changed:
        raise ValueError(f"{path} was trained with another {', '.join(changed)}: {FIX}")
    trainer.sae.load_weights_from_checkpoint(path)
    trainer.load_trainer_state(path)
    optim.fuse(trainer.optimizer)
    for weight, state in trainer.optimizer.state.items():  # the fused kernel walks both flat: one layout
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = torch.empty_like(weight.data).copy_(state[moment])
    trainer.recent.extend(rows.to(trainer.sae.device) for rows in extra.get("recent", []))
    trainer.generator.set_state(extra["generator"])
    for name in STATE:
        setattr(trainer, name, extra[name])
    trainer.fired = trainer.fired.to(trainer.sae.device)
    trainer.rows.extend(json.loads((path / "history.json").read_text()))
    trainer.known = extra["rows"]


def require_rows(path: Path, trainer, batch: Tensor) -> None:
    """Is ``batch`` the one that ``trainer`` saw last before it wrote ``path``?

    Raises:
        ValueError: it is not: other data, or another order.
    """
    if not traces.alike(trainer.known, traces.trace(batch)):
        raise ValueError(f"{path} was trained on other rows than these batches: {FIX}")
