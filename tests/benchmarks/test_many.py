"""Several SAEs on one stream: the language model runs once for all of them, so each costs less."""

import time
from itertools import islice

import pytest
import torch
from conftest import Peak

from saeutils.lm import streams, text
from saeutils.lm.models import default_device
from saeutils.saes import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig
from saeutils.training import train

BATCH, STEPS, D, N, K = 2048, 12, 640, 5120, 32


@pytest.mark.parametrize("how_many", [1, 2, 4, 8])
def test_cost_of_each(record, monkeypatch, how_many):
    monkeypatch.setenv("SAEUTILS_CAP", "shard_tokens=8192")
    data = text.load_text("wikipedia-summaries", max_docs=3000)
    stream = streams.stream(
        "gemma-3-270m", "blocks.9.hook_resid_post", data, batch_size=BATCH, buffer=1, normalise="scale"
    )
    first = next(stream)  # the LM is loaded, the pool is full
    torch.manual_seed(0)
    cfg = SparseTopKTrainingSAEConfig(d_in=D, d_sae=N, k=K, device=default_device())
    saes = {f"{i}": SparseTopKTrainingSAE(cfg) for i in range(how_many)}
    with Peak() as peak:
        train(saes, [first] * 2, 2, median_rows=0, progress=False)
    start = time.perf_counter()
    train(saes, islice(stream, STEPS), STEPS, median_rows=0, progress=False)
    seconds = (time.perf_counter() - start) / STEPS / how_many
    record("many", f"a step of each of {how_many} SAEs 640 → 5,120, LM included", "ours", seconds, peak.gib)
