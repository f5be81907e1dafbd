"""Checkpoints of a training run: written whole or not at all, hashed, read back bit for bit."""

import json
import os
import shutil
from pathlib import Path

import torch
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor

from saeutils.kernels import files, optim

FIX = "give another checkpoint folder, or delete this one"
STATE = ("fired", "seen", "resampled", "n_training_steps")
TOLERANCE = 1e-3  # of a trace: far above what another processor rounds otherwise, far below another seed


@torch.no_grad()
def trace(x: Tensor, n: int = 8) -> list[float]:
    """Numbers by which a tensor is known again: its norm, and ``n`` projections on fixed random signs, divided by the norm."""
    x = x.detach().to("cpu", torch.float32)
    x = x.reshape(len(x), -1) if x.ndim else x.reshape(1, 1)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(0, 2, (size, n), generator=generator) * 2.0 - 1 for size in x.shape)
    norm = x.norm()
    return [float(norm), *((x @ right * left).sum(0) / norm.clamp_min(1e-30)).tolist()]


def start_of(sae: TrainingSAE) -> dict[str, list[float]]:
    """:func:`trace` of all that an SAE starts from."""
    return {name: trace(tensor) for name, tensor in sae.state_dict().items()}


def _alike(a: list[float] | None, b: list[float] | None) -> bool:
    return a is not None and b is not None and all(abs(x - y) <= TOLERANCE * max(1, abs(x)) for x, y in zip(a, b, strict=True))


def save(folder: Path, trainer, batch: Tensor) -> None:
    """Write ``step-N`` under a temporary name, one process at a time, hash it, rename it; keep the newest two. ``batch``: the last one seen."""
    with files.lock("checkpoints", str(folder.resolve())):
        shutil.rmtree(tmp := folder / ".saving", ignore_errors=True)  # of a killed process
        try:
            _write(tmp, trainer, batch)
            shutil.rmtree(final := folder / f"step-{trainer.n_training_steps:08d}", ignore_errors=True)
            os.replace(tmp, final)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
        for old in sorted(folder.glob("step-*"))[:-2]:
            shutil.rmtree(old)


def _write(tmp: Path, trainer, batch: Tensor) -> None:
    trainer.sae.save_model(tmp)
    trainer.save_trainer_state(tmp)
    extra = {name: getattr(trainer, name) for name in STATE} | trainer.settings
    extra |= {"start": trainer.start, "rows": trace(batch)}
    extra["generator"] = trainer.generator.get_state()
    if trainer.settings["dead"] == "anthropic":
        extra["recent"] = list(trainer.recent)
    torch.save(extra, tmp / "extra.pt")
    (tmp / "history.json").write_text(json.dumps(trainer.rows))
    hashes = {f.name: files.sha256_of(f) for f in sorted(tmp.iterdir())}
    (tmp / "sha256.json").write_text(json.dumps(hashes))


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
    """Put ``trainer`` where it was when it wrote ``path``; :func:`require_rows` is for when its batches come.

    Raises:
        ValueError: the checkpoint was written under other settings, or began from other weights.
    """
    saved = json.loads((path / "cfg.json").read_text())
    extra = torch.load(path / "extra.pt", weights_only=True)
    cfg = json.loads(json.dumps(trainer.sae.cfg.to_dict()))
    changed = [k for k, v in saved.items() if k not in ("metadata", "device", "dtype") and cfg.get(k, v) != v]
    changed += [k for k, v in trainer.settings.items() if extra.get(k, v is None) != v]
    known = extra.get("start", {})
    if set(known) != set(trainer.start) or not all(_alike(known[name], now) for name, now in trainer.start.items()):
        changed.append("start (the weights that the SAE came with)")
    if changed:
        raise ValueError(f"{path} was trained with another {', '.join(changed)}: {FIX}")
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
    trainer.known = extra["rows"]


def require_rows(path: Path, trainer, batch: Tensor) -> None:
    """Is ``batch`` the one that ``trainer`` saw last before it wrote ``path``?

    Raises:
        ValueError: it is not: other data, or another order.
    """
    if not _alike(trainer.known, trace(batch)):
        raise ValueError(f"{path} was trained on other rows than these batches: {FIX}")
