"""An index of texts by latent, for any SAELens SAE and any language model: built once, kept by all that it depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy import sparse
from tqdm.auto import tqdm

from saeutils.analysis.features import LatentTable, encoded, residual
from saeutils.kernels import files
from saeutils.lm import text
from saeutils.lm.provenance import require_raw
from saeutils.lm.tokens import begin, heads
from saeutils.steering.edits import SINK

if TYPE_CHECKING:  # late: together they take seconds to import
    from sae_lens.saes.sae import SAE
    from transformer_lens.model_bridge import TransformerBridge


VERSION = 1  # of the index: raise it when the same model, SAE and texts would give another


def some_texts() -> list[str]:
    """Embedded texts of several kinds: encyclopaedia, film reviews, tweets, everyday sentences in English and Japanese."""
    pairs = text.load_text("tatoeba", max_docs=400)
    kinds = [text.load_text(name, max_docs=n)["text"] for name, n in (("wikipedia-summaries", 300), ("vader-movies", 500), ("vader-tweets", 300))]
    return [t for kind in (*kinds, pairs["ja"][::2], pairs["en"][1::2]) for t in kind]


def indexed(lm: TransformerBridge, sae: SAE, hook: str, texts: Sequence[str], context: int = 64) -> tuple[LatentTable, float]:
    """Latents of every token of ``texts`` (their first ``context`` tokens), and the root mean squared distance of the
    activations from their mean: the unit of steering strengths. BOS and attention sinks are left out.

    Raises:
        ValueError: no text, or an SAE of another hook point or of other rows.
    """
    require_raw(sae, hook)
    if not any(t.strip() for t in texts):
        raise ValueError("no texts to search: give some, or none for the embedded ones")
    key = files.key(VERSION, _weights(lm.original_model), _weights(sae), json.dumps(sae.cfg.to_dict(), sort_keys=True, default=str), hook, list(texts), context)
    path = files.cache_dir("index") / f"{key}.safetensors"
    with files.lock("index", key):
        if (found := _read(path)) is None:
            found = _built(lm, sae, hook, texts, context)
            with files.whole(path) as tmp:
                save_file(found, tmp)
    shape = (len(found["doc"]), sae.cfg.d_sae)
    acts = sparse.csc_array((found["data"], found["indices"], found["indptr"]), shape=shape)
    return LatentTable(acts, found["doc"], found["token"], len(texts)), float(found["spread"][0])


def _read(path: Path) -> dict[str, np.ndarray] | None:
    try:
        return load_file(path)
    except FileNotFoundError:
        return None
    except SafetensorError:  # truncated by a disk
        print(f"{path} is damaged: building the index again")
        return None


def _weights(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def _built(lm: TransformerBridge, sae: SAE, hook: str, texts: Sequence[str], context: int) -> dict[str, np.ndarray]:
    bos, read = begin(lm), heads(lm, texts, context)
    order = sorted((i for i, ids in enumerate(read) if len(ids) > len(bos)), key=lambda i: len(read[i]))
    docs, tokens, parts, rows = [], [], [], []
    for at in tqdm(range(0, len(order), 32), desc="indexing texts, once"):
        batch = order[at : at + 32]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(read[i]) for i in batch], batch_first=True)
        real = torch.arange(ids.shape[1]) < torch.tensor([len(read[i]) for i in batch])[:, None]
        real[:, : len(bos)] = False
        x = residual(lm, hook, ids.to(lm.cfg.device)).float().cpu()  # [batch, position, d]
        real &= x.norm(dim=2) <= SINK * x[real].norm(dim=1).median() if real.any() else real
        docs.append(torch.tensor(batch)[:, None].expand_as(real)[real])
        tokens.append(ids[real])
        rows.append(x[real])
        parts.append(encoded(sae, x[real]))
    doc, token, x = torch.cat(docs).numpy(), torch.cat(tokens).numpy(), torch.cat(rows)
    reading = np.argsort(doc, kind="stable")
    acts = sparse.vstack(parts).tocsr()[reading].tocsc()
    spread = np.array([float((x - x.mean(0)).pow(2).sum(1).mean().sqrt())])
    return {"data": acts.data, "indices": acts.indices, "indptr": acts.indptr, "doc": doc[reading], "token": token[reading], "spread": spread}
