"""Tiny random LMs of many architectures with a byte-level tokenizer, saved as folders: what is wrong by name shows here."""

import multiprocessing
import os
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

COMMON = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
PLAIN = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
# name → (class, its shape): the architectures that people bring
SHAPES = {
    "gpt2": ("GPT2LMHeadModel", dict(n_embd=32, n_layer=3, n_head=4, n_positions=64)),
    "neox": ("GPTNeoXForCausalLM", PLAIN),
    "phi": ("PhiForCausalLM", {**COMMON, "num_key_value_heads": 4}),
    "gemma2": ("Gemma2ForCausalLM", COMMON),
    "gemma3": ("Gemma3ForCausalLM", COMMON),
    "olmo": ("OlmoForCausalLM", {**COMMON, "num_key_value_heads": 4}),
    "olmo2": ("Olmo2ForCausalLM", COMMON),
    "olmo3": ("Olmo3ForCausalLM", COMMON),
    "granite": ("GraniteForCausalLM", {**COMMON, "residual_multiplier": 0.22, "logits_scaling": 3.0}),
    "bloom": ("BloomForCausalLM", dict(hidden_size=32, n_layer=3, n_head=4)),
    "cohere": ("CohereForCausalLM", COMMON),
    "starcoder2": ("Starcoder2ForCausalLM", COMMON),
    "glm4": ("Glm4ForCausalLM", COMMON),
    "qwen2": ("Qwen2ForCausalLM", COMMON),
    "qwen3": ("Qwen3ForCausalLM", COMMON),
    "llama": ("LlamaForCausalLM", COMMON),
}
WITHOUT_BOS = {"qwen2", "qwen3", "olmo", "olmo2", "olmo3"}


def tokenizer(bos: bool = True, template: str | None = None) -> transformers.PreTrainedTokenizerFast:
    """Bytes; ``<eos>`` is 0, ``<bos>`` 1 (a BOS only if asked for)."""
    vocab = {c: i for i, c in enumerate(["<eos>", "<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(BPE(vocab, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    known = {"eos_token": "<eos>", **({"bos_token": "<bos>"} if bos else {})}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **known)
    made.chat_template = template
    return made


def saved(kind: str, **changed: object) -> str:
    """A folder with a random model of one of :data:`SHAPES`, weights large enough to matter, norms and biases not trivial."""
    name, shape = SHAPES[kind]
    cls, words = getattr(transformers, name), tokenizer(kind not in WITHOUT_BOS)
    torch.manual_seed(0)
    ids = dict(vocab_size=len(words) + 2, bos_token_id=words.bos_token_id, eos_token_id=0, pad_token_id=0)
    model = cls(cls.config_class(**ids, **{**shape, **changed})).eval()
    for p in model.parameters():
        p.data = p.data * 4 if p.ndim > 1 else p.data + 0.3 * torch.randn_like(p)
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def sees() -> str:
    """A folder with a model that also sees, in one configuration (Gemma 3 from 4B on)."""
    words, folder = tokenizer(), tempfile.mkdtemp()
    text = dict(vocab_size=len(words) + 8, **COMMON)
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    torch.manual_seed(0)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    words.save_pretrained(Path(folder))
    return folder


def forks(*imported: str) -> multiprocessing.context.BaseContext:
    """Processes forked from one that has imported these modules and sees no GPU: CUDA survives no fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*imported])
    with patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
        forkserver.ensure_running()
    return context
