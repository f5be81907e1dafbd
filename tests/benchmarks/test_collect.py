"""Collection against a bare transformers forward pass, truncated at the same block, on the same text in one run."""

import time

import torch

from saeutils import activations, archives, models, text

LAYER, TOKENS, CONTEXT = 9, 40_000, 128


def test_collect_keeps_up_with_a_bare_forward(tmp_path, monkeypatch, record):
    data = text.load_text("wikipedia-summaries", max_docs=1500)
    model, tokenizer = models.load_hf("gemma-3-270m", layers=LAYER + 1)
    ids = [i for row in tokenizer(list(data["text"]), add_special_tokens=False)["input_ids"] for i in row][:TOKENS]
    batches = (
        torch.tensor(ids[: TOKENS // 2048 * 2048]).view(-1, 16, CONTEXT).to(model.device)
    )  # packed: no padding at all
    real = archives.cache_dir
    monkeypatch.setattr(archives, "cache_dir", lambda *p: tmp_path if p[0] == "activations" else real(*p))
    monkeypatch.setattr(models, "load_hf", lambda *a, **k: (model, tokenizer))  # loading is not what is timed
    rates = {"bare": [], "collect": []}
    with torch.inference_mode():
        model.model(batches[0], use_cache=False)
        for round_ in range(3):
            start = time.perf_counter()
            for batch in batches:
                model.model(batch, use_cache=False)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            rates["bare"].append(batches.numel() / (time.perf_counter() - start))
            for f in tmp_path.iterdir():
                f.unlink()
            start = time.perf_counter()
            activations.collect(
                "gemma-3-270m", f"blocks.{LAYER}.hook_resid_post", data, n_tokens=TOKENS, context=CONTEXT, seed=round_
            )
            rates["collect"].append(TOKENS / (time.perf_counter() - start))
    for who, name in (("floor", "bare"), ("ours", "collect")):
        record("collect", f"{TOKENS:,} tokens, block {LAYER} of Gemma-3-270m", who, TOKENS / max(rates[name]))
    print(
        f"\nbare forward {max(rates['bare']):,.0f} tok/s, collect {max(rates['collect']):,.0f}: {max(rates['collect']) / max(rates['bare']):.2f}"
    )
