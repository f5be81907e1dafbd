"""A stand-in for the Hugging Face hub on loopback: tiny random weights under real ids and real file layouts.

``build(folder)`` writes the repositories, ``serve(folder)`` answers the requests that transformers, huggingface_hub and
datasets make. Add a model or data set by one call in ``build``.
"""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

import numpy as np
import pandas as pd
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from saeutils.lm import text

REVISION = "0" * 40


def _tokenizer(corpus: list[str]) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's, small."""
    core = Tokenizer(BPE())
    core.pre_tokenizer, core.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    special = ["<|endoftext|>"]
    core.train_from_iterator(
        corpus, BpeTrainer(vocab_size=2000, special_tokens=special, initial_alphabet=ByteLevel.alphabet())
    )
    end = special[0]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token=end, eos_token=end, unk_token=end)


def _gpt2(folder: Path, tokenizer: transformers.PreTrainedTokenizerFast, layers: int, width: int = 32) -> None:
    torch.manual_seed(0)
    end = tokenizer.bos_token_id
    shape = dict(n_layer=layers, n_head=2, n_embd=width, n_positions=1024, bos_token_id=end, eos_token_id=end)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _openai_sae(folder: Path, width: int = 32, d_sae: int = 131_072) -> None:
    """The layout of jbloom/GPT2-Small-OAI-v5-128k-resid-post-SAEs: an old SAELens config beside safetensors."""
    folder.mkdir(parents=True)
    hook = "blocks.8.hook_resid_post"
    cfg = {
        "d_in": width, "d_sae": d_sae, "dtype": "torch.float32", "device": "cpu", "model_name": "gpt2-small",
        "hook_point": hook, "hook_name": hook, "hook_point_layer": 8, "hook_layer": 8, "hook_head_index": None,
        "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 32}, "apply_b_dec_to_input": True,
        "normalize_activations": "layer_norm", "finetuning_scaling_factor": False, "context_size": 64,
        "prepend_bos": False, "sae_lens_training_version": None, "dataset_path": "Skylion007/openwebtext",
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(cfg))
    torch.manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, width), dim=1)
    weights = {"W_enc": W_dec.T.contiguous(), "W_dec": W_dec, "b_enc": torch.zeros(d_sae), "b_dec": torch.zeros(width)}
    save_file(weights, folder / "sae_weights.safetensors")


def _gemma2(folder: Path, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    """Real width and depth (the SAEs' configs fix d_in = 2304), everything else tiny."""
    torch.manual_seed(0)
    shape = dict(hidden_size=2304, num_hidden_layers=26, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    end = tokenizer.bos_token_id
    ids = dict(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(vocab_size=len(tokenizer), intermediate_size=200, **shape, **ids)
    ).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def thin_gemma(real: Path, folder: Path, neurons: int = 256) -> None:
    """Gemma-3-270m with an eighth of its MLPs, as a converted folder: a dictionary of 2 × 256 latents instead of 4,096."""
    config = transformers.AutoConfig.from_pretrained(real)
    config.intermediate_size = neurons
    weights = load_file(real / "model.safetensors")
    for name, w in weights.items():
        if ".mlp." in name:
            weights[name] = w[:, :neurons] if "down_proj" in name else w[:neurons]
    model = transformers.Gemma3ForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(weights, strict=False)  # the vocabulary matrix is tied, and saved once
    model.save_pretrained(folder)
    for file in real.glob("tokenizer*"):
        (folder / file.name).symlink_to(file)
    hashes = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}
    (folder / "sha256.json").write_text(json.dumps(hashes))


def _llm_jp(folder: Path, tokenizer: transformers.PreTrainedTokenizerFast, layers: int, seed: int = 0) -> None:
    """Of LLM-jp-3's shape and depth, tiny width."""
    torch.manual_seed(seed)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2)
    ids = dict(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**ids, **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _pythia(folder: Path, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    """Training checkpoints as revisions of one repository (every revision answers with the same files here)."""
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    (folder / ".revisions").write_text("step0 step512 step143000 step1000-tokens4B")


def _qwen(folder: Path, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    """Qwen2.5-1.5B's depth, tiny width; its tokenizer has no BOS."""
    heads = dict(num_attention_heads=2, num_key_value_heads=1)
    shape = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=28, **heads)
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape)).save_pretrained(folder)
    core = tokenizer.backend_tokenizer
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>").save_pretrained(folder)


def _gemma_scope(folder: Path, d_in: int = 2304, d_sae: int = 16_384) -> None:
    """The layout of google/gemma-scope-2b-pt-res: one params.npz; rows repeat, so that the file stays small."""
    folder.mkdir(parents=True)
    tile = np.random.default_rng(0).normal(size=(64, d_in)).astype(np.float16)
    rows = np.tile(tile / np.linalg.norm(tile, axis=1, keepdims=True), (d_sae // 64, 1))
    zeros = {"b_enc": np.zeros(d_sae, np.float16), "b_dec": np.zeros(d_in, np.float16)}
    np.savez_compressed(folder / "params.npz", W_enc=rows.T, W_dec=rows, threshold=np.ones(d_sae, np.float16), **zeros)


def _gemma_scope_2(folder: Path, d_in: int = 640, d_sae: int = 16_384) -> None:
    """The layout of google/gemma-scope-2-270m-pt: config.json beside params.safetensors."""
    folder.mkdir(parents=True)
    cfg = {"architecture": "jump_relu", "model_name": "gemma-v3-270m", "l0": 60, "width": d_sae}
    (folder / "config.json").write_text(json.dumps(cfg))
    rows = torch.nn.functional.normalize(torch.randn(d_sae, d_in), dim=1).half()
    zeros = {"b_enc": torch.zeros(d_sae), "b_dec": torch.zeros(d_in)}
    weights = {"w_enc": rows.T.contiguous(), "w_dec": rows, "threshold": torch.full((d_sae,), 500.0), **zeros}
    save_file(weights, folder / "params.safetensors")


def _saebench_topk(folder: Path, d_in: int = 2304, d_sae: int = 4096) -> None:
    """The layout of dictionary_learning's repositories (SAEBench): config.json beside ae.pt."""
    folder.mkdir(parents=True)
    trainer = {"dict_class": "AutoEncoderTopK", "layer": 12, "k": 20, "activation_dim": d_in, "dict_size": d_sae}
    cfg = {"trainer": {**trainer, "lm_name": "google/gemma-2-2b"}, "buffer": {"ctx_len": 128}}
    (folder / "config.json").write_text(json.dumps(cfg))
    rows = torch.nn.functional.normalize(torch.randn(d_sae, d_in), dim=1).half()
    weights = {
        "encoder.weight": rows,
        "encoder.bias": torch.zeros(d_sae),
        "decoder.weight": rows.T,
        "b_dec": torch.zeros(d_in),
    }
    torch.save(weights, folder / "ae.pt")


def build(folder: Path) -> None:
    """Write every repository that a notebook asks for, as ``models/OWNER/NAME`` and ``datasets/OWNER/NAME``."""
    english = text.load_text("wikipedia-summaries", max_docs=300)["text"]
    korean = text.load_text("korean")["text"]
    tokenizer = _tokenizer([*english, *korean[:100]])
    models, data = folder / "models", folder / "datasets"
    _gpt2(models / "openai-community" / "gpt2", tokenizer, layers=12)
    _gpt2(models / "distilbert" / "distilgpt2", tokenizer, layers=6)
    _openai_sae(models / "jbloom" / "GPT2-Small-OAI-v5-128k-resid-post-SAEs" / "v5_128k_layer_8")
    _gemma2(models / "google" / "gemma-2-2b", tokenizer)
    _qwen(models / "Qwen" / "Qwen2.5-1.5B", tokenizer)
    _gemma_scope(models / "google" / "gemma-scope-2b-pt-res" / "layer_12" / "width_16k" / "average_l0_82")
    _gemma_scope_2(models / "google" / "gemma-scope-2-270m-pt" / "resid_post" / "layer_9_width_16k_l0_medium")
    bench = models / "canrager" / "saebench_gemma-2-2b_width-2pow12_date-1109"
    _saebench_topk(bench / "gemma-2-2b_topk_width-2pow12_date-1109" / "resid_post_layer_12" / "trainer_0")
    pairs = text.load_text("tatoeba", max_docs=6000)
    both = _tokenizer([*pairs["ja"], *pairs["en"]])
    for i, step in enumerate((10, 100, 1000, 10_000, 100_000, 988_240)):  # on no hub: local folders, one a step
        _llm_jp(folder / "llm-jp-3-1.8b" / f"iter_{step:07d}", both, layers=24, seed=i)
    for size, layers in (("150m", 12), ("1.8b", 24)):
        _llm_jp(models / "llm-jp" / f"llm-jp-3-{size}", both, layers)
    _pythia(models / "EleutherAI" / "pythia-14m", both)
    for code in ("ja", "en"):  # articles of twelve sentences; the configurations are named in the card, as on the hub
        articles = [" ".join(pairs[code][at : at + 12]) for at in range(0, len(pairs), 12)]
        (data / "wikimedia" / "wikipedia" / f"20231101.{code}").mkdir(parents=True)
        pd.DataFrame({"text": articles}).to_parquet(
            data / "wikimedia/wikipedia" / f"20231101.{code}" / "train-00000-of-00001.parquet"
        )
    listed = "".join(
        f"- config_name: 20231101.{code}\n  data_files:\n  - split: train\n    path: 20231101.{code}/train-*\n"
        for code in ("ja", "en")
    )
    (data / "wikimedia" / "wikipedia" / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    (models / "meta-llama" / "Llama-3.2-1B").mkdir(parents=True)
    (models / "meta-llama" / "Llama-3.2-1B" / ".gated").touch()
    for name, frame in {
        "Skylion007/openwebtext": pd.DataFrame({"text": english}),
        "monology/pile-uncopyrighted": pd.DataFrame({"text": english}),
        "MarkrAI/KoCommercial-Dataset": pd.DataFrame({"instruction": korean, "input": "", "output": korean}),
    }.items():
        (data / name / "data").mkdir(parents=True)
        frame.to_parquet(data / name / "data" / "train-00000-of-00001.parquet")


ALIASES = {"gpt2": "openai-community/gpt2", "distilgpt2": "distilbert/distilgpt2"}


class _Hub(BaseHTTPRequestHandler):
    root: Path
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def _repository(self, parts: list[str]) -> tuple[Path | None, str, list[str]]:
        """Path segments after any prefix → (folder, id, the segments that are left)."""
        kind = "models"
        if parts[0] in ("models", "datasets"):
            kind, parts = parts[0], parts[1:]
        if parts[0] in ALIASES:
            parts = [*ALIASES[parts[0]].split("/"), *parts[1:]]
        folder = self.root / kind / "/".join(parts[:2])
        return (folder if folder.is_dir() else None), "/".join(parts[:2]), parts[2:]

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, what: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": what, "X-Error-Message": what})

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        url = urlparse(self.path)
        parts = [unquote(p) for p in url.path.strip("/").split("/")]
        api = parts[0] == "api"
        folder, name, rest = self._repository(parts[1:] if api else parts)
        if folder is None:
            return self._refuse(404, "RepoNotFound")
        if (folder / ".gated").exists() and not self.headers.get("Authorization"):
            return self._refuse(401, "GatedRepo")
        if not api:
            return (
                self._file(folder, "/".join(rest[2:]))
                if rest[:1] == ["resolve"]
                else self._refuse(404, "EntryNotFound")
            )
        if rest[:1] == ["refs"]:
            names = (folder / ".revisions").read_text().split() if (folder / ".revisions").exists() else []
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": REVISION} for n in ["main", *names]]
            return self._json({"branches": branches, "tags": [], "converts": []})
        if rest[:1] == ["tree"]:
            return self._tree(
                folder, "/".join(rest[2:]), parse_qs(url.query).get("recursive", ["false"])[0].lower() == "true"
            )
        if rest[:1] == ["paths-info"]:
            asked = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode()).get("paths", [])
            return self._json([self._entry(folder, folder / p) for p in asked if (folder / p).exists()])
        files = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
        flags = {"private": False, "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
        dates = {"lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z"}
        self._json({"id": name, "sha": REVISION, "siblings": [{"rfilename": f} for f in files], **flags, **dates})

    def _entry(self, folder: Path, path: Path) -> dict:
        size = path.stat().st_size if path.is_file() else 0
        kind = "file" if path.is_file() else "directory"
        return {
            "type": kind,
            "path": str(path.relative_to(folder)),
            "size": size,
            "oid": hashlib.sha1(str(path).encode()).hexdigest(),
        }

    def _tree(self, folder: Path, inside: str, recursive: bool) -> None:
        start = folder / inside
        if not start.is_dir():
            return self._refuse(404, "EntryNotFound")
        self._json([self._entry(folder, p) for p in sorted(start.rglob("*") if recursive else start.iterdir())])

    def _file(self, folder: Path, name: str) -> None:
        path = folder / name
        if not path.is_file():
            return self._refuse(404, "EntryNotFound")
        content = path.read_bytes()
        tag = hashlib.sha1(content).hexdigest()
        headers = {"X-Repo-Commit": REVISION, "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last or len(content)), len(content) - 1)
            part = content[start : stop + 1]
            return self._send(206, part, {**headers, "Content-Range": f"bytes {start}-{stop}/{len(content)}"})
        self._send(200, content, headers)

    do_GET = do_HEAD = do_POST = _answer


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve the repositories under ``folder`` on loopback; gives the address for ``HF_ENDPOINT``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"root": folder}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
