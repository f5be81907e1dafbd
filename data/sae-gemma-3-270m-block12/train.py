"""Train the SAE of this folder again, from the root: ``PYTHONPATH=. python data/sae-gemma-3-270m-block12/train.py OUT``.

About two hours on two cores; stopped, it goes on.

Shards of activations and checkpoints lie in ``data/cache``; OUT gets the SAE, ``log.csv`` and ``card.json``. Test documents
are those of the first edition's card: 2% by a hash of their number among the English sources; a Tatoeba pair has one number
in both languages, Korean pages are numbered on their own.
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from sae_lens import SAE
from safetensors.torch import load_file, save_file

from saeutils import metrics, steering
from saeutils.kernels import files
from saeutils.lm import activations, models, text
from saeutils.saes import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig, initializers
from saeutils.training import train

LM, HOOK = "gemma-3-270m", "blocks.12.hook_resid_post"
ENGLISH = ["wikipedia-summaries", "speeches", "tatoeba", "vader-products", "vader-news", "vader-tweets", "labelled/amzn_rev"]
SHARE = {"en": 0.54, "ja": 0.6, "ko": 1.0}  # of each language's training documents
STEPS, BATCH, LR = 7_000, 4096, 1.2e-3


def documents() -> pd.DataFrame:
    """Every document: ``text``, ``language``, ``source``, ``test``."""
    parts = [(name, text.load_text(name)) for name in ENGLISH]
    table = pd.concat([pd.DataFrame({"text": rows["text"], "source": name}) for name, rows in parts], ignore_index=True)
    table["language"], table["number"] = "en", np.arange(len(table))
    pairs = table[table["source"] == "tatoeba"].assign(language="ja", text=dict(parts)["tatoeba"]["ja"])
    pages = pd.DataFrame({"text": text.load_text("korean")["text"], "source": "korean", "language": "ko"})
    table = pd.concat([table, pairs, pages.assign(number=np.arange(len(pages)))], ignore_index=True)
    held_out = activations.Activations("", fractions=(0.96, 0.02, 0.02)).split_of(torch.tensor(table["number"].to_numpy()))
    return table.assign(test=held_out.numpy() == 2)


def rows_of(table: pd.DataFrame) -> activations.Activations:
    return activations.collect(LM, HOOK, Dataset.from_dict({"text": table["text"].tolist()}))


def measured(sae: SAE, test: pd.DataFrame, lm: object) -> dict[str, dict[str, float]]:
    """Language or source → FVU, L0, dead share on all its test rows, loss recovered on 24 of its test documents."""
    out = {}
    for language, rows in test.groupby("language", sort=False):
        x = rows_of(rows).all()["x"]
        out[language] = {"test_rows": len(x), **metrics.evaluate(sae, x)}
        sources = {name: group["text"].tolist()[:24] for name, group in rows.groupby("source", sort=False)}
        for name, texts in sources.items() if language == "en" else [(language, next(iter(sources.values())))]:
            lost = steering.loss_recovered(lm, sae, HOOK, texts, context=128)
            out.setdefault(name, {}).update(lost)
    return out


def main(out: Path) -> None:
    torch.set_num_threads(2)
    table = documents()
    shares = table["language"].map(SHARE)
    kept = ~table["test"] & (np.random.default_rng(0).random(len(table)) < shares)
    print(table.assign(kept=kept).groupby("language", sort=False)[["kept", "test"]].sum(), flush=True)
    acts = rows_of(table[kept])
    acts.fractions = (1.0, 0.0, 0.0)
    torch.manual_seed(0)
    sae = SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(d_in=640, d_sae=8192, k=64, aux_loss_coefficient=1 / 32))
    initializers.tie(sae)
    batches = partial(acts.batches, BATCH, normalise="scale", centre=True, group=12)
    runs = files.cache_dir("runs", f"sae-{files.key(acts.folder.name, STEPS, BATCH, LR, sae.cfg.to_dict())}")
    history = train(sae, batches, STEPS, lr=LR, dead_window=100, checkpoint=runs, checkpoint_every=250, log_every=50)
    initializers.fold_scale(sae, acts.scale(), acts.mean)
    out.mkdir(parents=True, exist_ok=True)
    history.to_csv(out / "log.csv", index=False, float_format="%.5g")
    sae.cfg.metadata.model_name, sae.cfg.metadata.context_size, sae.cfg.metadata.prepend_bos = "google/gemma-3-270m", 128, True
    sae.save_inference_model(str(out))
    path = out / "sae_weights.safetensors"
    weights = {name: w.half() if w.ndim == 2 else w for name, w in load_file(path).items()}  # 21 MB; biases stay exact
    with files.whole(path) as tmp:
        save_file(weights, tmp)
    lm, test = models.load_lm(LM), table[table["test"]]
    shipped = Path(__file__).parent
    named = {"this": SAE.load_from_disk(str(out)), "shipped": SAE.load_from_disk(str(shipped))}
    found = {name: measured(s, test, lm) for name, s in named.items()}
    card = {"lm": LM, "hook": HOOK, "architecture": "topk", "d_in": 640, "d_sae": 8192, "k": 64, "tokens_distinct": acts.count()}
    card |= {"steps": STEPS, "batch": BATCH, "lr": LR, "share": SHARE, **found}
    with files.whole(out / "card.json") as tmp:
        tmp.write_text(json.dumps(card, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
