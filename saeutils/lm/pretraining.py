"""The training loop of small language models: kept checkpoints, a schedule, and a run that goes on where it was killed."""

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saeutils.kernels import files, memory, traces
from saeutils.lm import adapters, models

VERSION = 1  # raise it when the same run would give another model


def fit(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]],
    steps: Sequence[int], lr: float, *, of: dict, betas: tuple[float, float] = (0.9, 0.95), every: int = 500,
) -> dict[int, dict[str, str]]:  # fmt: skip
    """Train in place and keep ``step-N`` for every N of ``steps`` (0: the weights it starts from), in transformers' format and bf16.

    AdamW (weight decay .1), a warm-up over a fiftieth of the run, cosine to a tenth, gradient norm clipped at 1. A model with
    an adapter (``add_adapter`` of transformers) trains and keeps that alone.

    Args:
        batches: step → iterator from that step of (ids [batch, position], wanted: which tokens are to be predicted).
        of: what the run depends on besides its other arguments, as JSON knows it: the texts' key, seeds.
        every: steps between states to go on from; each kept step writes one too.

    Returns:
        :func:`saeutils.lm.models.checkpoints` of ``folder``.

    Raises:
        ValueError: the folder holds a run of other settings or another start; a loss of NaN or inf.
    """
    memory.reuse()
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**of, "steps": max(steps), "lr": lr, "betas": list(betas), "model": model.config.to_dict()}
    with files.lock("training run", str(folder.resolve())):
        files.sweep(folder)
        _require_same_run(folder, settings, traces.of(model))
        if not all((folder / f"step-{n:07d}").exists() for n in steps):
            _train(folder, model, tokenizer, batches, steps, lr, betas, every)
    return models.checkpoints(str(folder), steps)


def _train(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]],
    steps: Sequence[int], lr: float, betas: tuple[float, float], every: int,
) -> None:  # fmt: skip
    last, done = max(steps), 0
    learned = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(learned.values(), lr, betas=betas, weight_decay=0.1, fused=True)
    running = folder / "running.pt"
    if state := _state(running, model.device):
        with torch.no_grad():
            for name, weight in learned.items():
                weight.copy_(state["model"][name])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    elif 0 in steps:
        keep(model, tokenizer, folder / "step-0000000")
    kind = model.device.type
    native = models.default_dtype(kind) == torch.bfloat16
    half = kind == "cuda" and not native  # a T4 has no bf16: float16, with its gradients scaled
    scaler = torch.amp.GradScaler(kind, enabled=half)
    if done and state["scaler"]:  # empty where the run began on a device that needs none
        scaler.load_state_dict(state["scaler"])
    model.eval()  # no dropout: a run can be repeated, and goes on as if it had not stopped
    bar = tqdm(zip(range(done, last), batches(done)), initial=done, total=last, desc="training the LM", unit=" steps")
    for step, (ids, wanted) in bar:
        share = min(1, (step + 1) / max(1, last // 50)) * (0.55 + 0.45 * math.cos(math.pi * step / last))
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        ids, wanted = ids.to(model.device), wanted[:, 1:].to(model.device)
        with torch.autocast(kind, torch.float16 if half else torch.bfloat16, native or half):
            hidden = model.base_model(ids).last_hidden_state[:, :-1]  # [batch, position − 1, d]
            logits = model.get_output_embeddings()(hidden[wanted])  # most of a small model's work: only where it counts
        loss = F.cross_entropy(logits.float(), ids[:, 1:][wanted])
        if not torch.isfinite(loss):
            raise ValueError(f"loss is {loss.item()} at step {step}: take a smaller lr")
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(learned.values(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
        if step + 1 in steps:
            keep(model, tokenizer, folder / f"step-{step + 1:07d}")
        if step + 1 in steps or (step + 1) % every == 0:
            state = {"model": learned, "optimizer": optimizer.state_dict(), "step": step + 1}
            state["scaler"] = scaler.state_dict()
            with files.whole(running) as tmp:
                torch.save(state, tmp)


def _state(path: Path, device: torch.device) -> dict | None:
    """What a run goes on from; None if there is nothing, or what a disk has truncated."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        return None
    except (RuntimeError, EOFError, ValueError, UnpicklingError):
        print(f"{path} is damaged: starting from the beginning")
        return None


def _require_same_run(folder: Path, asked: dict, start: dict[str, list[float]]) -> None:
    """Write down what a folder's run depends on, or compare with what stands there; ``start``: traces of the first weights."""
    asked, path = json.loads(json.dumps({"version": VERSION, **asked}, default=str)), folder / "run.json"
    if not path.exists():
        if list(folder.glob("step-*")):
            raise ValueError(f"{folder} holds checkpoints of a run that did not write down its settings: delete it")
        with files.whole(path) as tmp:
            tmp.write_text(json.dumps({**asked, "start": start}, indent=1))
    known = json.loads(path.read_text())
    began = known.pop("start")
    other = sorted(k for k in {*known, *asked} if known.get(k) != asked.get(k))
    if other := other + ["first weights"] * (not traces.all_alike(began, start)):
        raise ValueError(f"{folder} holds a run of other {', '.join(other)}: delete it, or give another folder")


def keep(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model with tied embeddings, or its adapter, in transformers' format, bf16, under a temporary name first."""
    if getattr(model, "peft_config", None):
        return adapters.keep(model, folder)
    state = {k: v.detach().to("cpu", torch.bfloat16) for k, v in model.state_dict().items() if k != "lm_head.weight"}
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], "bfloat16"
    with files.whole_folder(folder, again=True) as tmp:
        save_file(state, tmp / "model.safetensors", {"format": "pt"})
        config.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
