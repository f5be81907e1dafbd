"""Low-rank adapters (LoRA, arXiv:2106.09685) of a language model: a few megabytes stand for a fine-tuned one."""

import json
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from saeutils.kernels import files

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


def add(model: PreTrainedModel, name: str, rank: int = 16, seed: int = 0) -> PreTrainedModel:
    """Freeze a model and give every linear map of its blocks W an update that learns, W + 2 B A (A [rank, in], B [out, rank]).

    B is zero at first, so that the model stays the same; A is drawn on the CPU, the same for every device.

    Args:
        model: as :func:`saeutils.lm.models.load_hf` returns it; it is changed in place and returned.
        name: what it was loaded by, kept beside the adapter.
    """
    from peft import LoraConfig  # late: it takes seconds to import

    device = model.device
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.cpu().add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    model.peft_config["default"].base_model_name_or_path = name
    return model.to(device)


def keep(model: PreTrainedModel, folder: Path) -> None:
    """Write a model's adapter in PEFT's format, bf16, under a temporary name first."""
    # names as of a model inside PEFT's, which is what PEFT and the hub read
    state = {PREFIX + k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in _weights(model).items()}
    with files.whole_folder(folder, again=True) as tmp:
        save_file(state, tmp / WEIGHTS, {"format": "pt"})
        model.peft_config["default"].save_pretrained(tmp)


def base(folder: str) -> str | None:
    """The model that an adapter's folder belongs to; None: it is no adapter's.

    Raises:
        ValueError: the folder names no model, or its weights are not in safetensors.
    """
    if not (config := Path(folder) / CONFIG).exists():
        return None
    if not (config.parent / WEIGHTS).exists():
        raise ValueError(f"{folder} has no {WEIGHTS}: save the adapter again with safe_serialization=True")
    if not (found := json.loads(config.read_text()).get("base_model_name_or_path")):
        raise ValueError(f"{config} does not say which model it adapts: write its name under base_model_name_or_path")
    return found


def merged(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """The model with an adapter's updates added to its weights.

    Raises:
        ValueError: the adapter lacks weights; PEFT itself would leave those maps as they were and warn.
    """
    from peft import PeftModel

    with safe_open(Path(folder) / WEIGHTS, "pt") as f, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it would warn of is raised below
        adapted, found = PeftModel.from_pretrained(model, folder), set(f.keys())
    if missing := sorted(set(_weights(adapted)) - found):
        raise ValueError(f"{folder} lacks {len(missing)} weights ({', '.join(missing[:2])}, …): is it of another model?")
    return adapted.merge_and_unload().eval()


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's own weights by name. PEFT would ask the hub whether the embeddings were resized; they never are here."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, save_embedding_layers=False)
