"""Collection against a bare transformers forward pass, truncated at the same block, on the same text in one run.

The floor gets rows of exactly 128 tokens with no padding, no BOS, nothing kept. Short documents leave padding behind
(windows are batched by length), long ones hardly any: the bare pass over the very batches that collection made tells
padding from the rest. Ours ends with one pass of shuffled, centred, scaled batches for training. And does bfloat16, the
default where it is quick, change what an SAE makes of the activations?
"""

import statistics
import time
from itertools import islice

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE

from saeutils import metrics
from saeutils.kernels import files
from saeutils.lm import activations, collector, models, text
from saeutils.notebook import claims

LM, LAYER, TOKENS, CONTEXT = "gemma-3-270m", 9, 240_000, 128  # four shards: what a notebook collects


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache for activations."""
    real = files.cache_dir
    monkeypatch.setattr(files, "cache_dir", lambda *p: tmp_path if p[0] == "activations" else real(*p))
    return tmp_path


@pytest.mark.parametrize("kind", ["short documents", "long documents"])
def test_collect_keeps_up_with_a_bare_forward(fresh, monkeypatch, record, kind):
    data = text.load_text("wikipedia-summaries", max_docs=3000)
    if kind == "long documents":
        data = Dataset.from_dict({"text": ["\n".join(data[i : i + 30]["text"]) for i in range(0, len(data), 30)]})
    model, tokenizer = models.load_hf(LM, layers=LAYER + 1)
    ids = [i for row in tokenizer(list(data["text"]), add_special_tokens=False)["input_ids"] for i in row]
    whole = torch.tensor(ids[: 15 * 2048]).view(-1, 16, CONTEXT).to(model.device)
    monkeypatch.setattr(models, "load_hf", lambda *a, **k: (model, tokenizer))  # loading is not what is timed
    forward, padded = collector.Collector.forward, []
    monkeypatch.setattr(collector.Collector, "forward", lambda self, ids: padded.append(ids) or forward(self, ids))
    seconds = {"floor": [], "ours": [], "bare pass, same batches": []}

    def bare(batches) -> float:
        with torch.inference_mode():
            start = time.perf_counter()
            for batch in batches:
                model.model(batch.to(model.device), use_cache=False)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter() - start

    bare(whole)
    for seed in range(2):  # a processor's pace drifts: the bare pass is timed before and after
        for f in fresh.iterdir():
            f.unlink()
        padded.clear()
        before, start = bare(whole), time.perf_counter()
        acts = activations.collect(
            LM, f"blocks.{LAYER}.hook_resid_post", data, n_tokens=TOKENS, context=CONTEXT, seed=seed
        )
        for _ in islice(acts.batches(centre=True, normalise="scale"), acts.count() // 4096):
            pass
        seconds["ours"].append(time.perf_counter() - start)
        seconds["floor"].append((before + bare(whole)) / 2 / whole.numel() * TOKENS)
        seconds["bare pass, same batches"].append(bare(padded))
    median = {who: statistics.median(times) for who, times in seconds.items()}
    floor, row = median.pop("floor"), f"{TOKENS:,} tokens, block {LAYER} of Gemma-3-270m, {kind}"
    for who, time_taken in median.items():
        record("collect", row, who, time_taken, floor=floor)


def test_bfloat16_changes_little(fresh):
    sae = SAE.load_from_disk(claims.root() / "data" / "sae-gemma-3-270m-block12")
    data, fvu = text.load_text("wikipedia-summaries", max_docs=200), {}
    for dtype in (torch.float32, torch.bfloat16):
        for f in fresh.iterdir():
            f.unlink()
        acts = activations.collect(LM, "blocks.12.hook_resid_post", data, n_tokens=20_000, dtype=dtype)
        fvu[dtype] = metrics.evaluate(sae, acts.all()["x"])["fvu"]
    print(
        f"\nFVU of the shipped SAE: {fvu[torch.float32]:.4f} on float32 activations, {fvu[torch.bfloat16]:.4f} on bfloat16"
    )
    assert fvu[torch.bfloat16] == pytest.approx(fvu[torch.float32], rel=0.05)
