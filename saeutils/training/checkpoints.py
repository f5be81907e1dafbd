"""Checkpoints of a training run: written whole or not at all, hashed, read back bit for bit."""

import json
import os
import shutil
from pathlib import Path

import torch

from saeutils.kernels import files, optim

STATE = ("fired", "seen", "resampled", "n_training_steps")


def save(folder: Path, trainer) -> None:
    """Write ``step-N`` under a temporary name, hash it, rename it; keep the newest two."""
    tmp = folder / ".saving"
    shutil.rmtree(tmp, ignore_errors=True)
    trainer.sae.save_model(tmp)
    trainer.save_trainer_state(tmp)
    extra = {name: getattr(trainer, name) for name in STATE} | trainer.settings
    extra["generator"] = trainer.generator.get_state()
    if trainer.settings["dead"] == "anthropic":
        extra["recent"] = list(trainer.recent)
    torch.save(extra, tmp / "extra.pt")
    (tmp / "history.json").write_text(json.dumps(trainer.rows))
    hashes = {f.name: files.sha256_of(f) for f in sorted(tmp.iterdir())}
    (tmp / "sha256.json").write_text(json.dumps(hashes))
    shutil.rmtree(final := folder / f"step-{trainer.n_training_steps:08d}", ignore_errors=True)
    os.replace(tmp, final)
    for old in sorted(folder.glob("step-*"))[:-2]:
        shutil.rmtree(old)


def step_of(path: Path) -> int:
    """The step at which a checkpoint was written."""
    return int(path.name.split("-")[1])


def newest(folder: Path, at_most: int | None = None) -> Path | None:
    """The newest whole checkpoint in ``folder``, of step ``at_most`` or before; what is damaged is passed over."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        if at_most is not None and step_of(path) > at_most:
            continue
        recorded = path / "sha256.json"
        hashes = json.loads(recorded.read_text()) if recorded.exists() else {}
        if hashes and all((path / f).exists() and files.sha256_of(path / f) == h for f, h in hashes.items()):
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
    """Put ``trainer`` where it was when it wrote ``path``.

    Raises:
        ValueError: the checkpoint was written under other settings.
    """
    saved = json.loads((path / "cfg.json").read_text())
    extra = torch.load(path / "extra.pt", weights_only=True)
    cfg = json.loads(json.dumps(trainer.sae.cfg.to_dict()))
    changed = [k for k, v in saved.items() if k not in ("metadata", "device", "dtype") and cfg.get(k, v) != v]
    if changed := changed + [k for k, v in trainer.settings.items() if extra[k] != v]:
        raise ValueError(f"{path} was trained with another {', '.join(changed)}: give another checkpoint folder")
    trainer.sae.load_weights_from_checkpoint(path)
    trainer.load_trainer_state(path)
    optim.fuse(trainer.optimizer)
    for weight, state in trainer.optimizer.state.items():  # the fused kernel walks both flat: one layout
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = torch.empty_like(weight.data).copy_(state[moment])
    trainer.recent.extend(extra.get("recent", []))
    trainer.generator.set_state(extra["generator"])
    for name in STATE:
        setattr(trainer, name, extra[name])
    trainer.rows.extend(json.loads((path / "history.json").read_text()))
