"""From text to a trained SAE, the language model's load included: ours, SAELens' runner, and what the hardware asks for.

Every row is seen once. Floor: the bare pace of the truncated language model (whole windows, nothing kept) times the tokens, and
the float32 encoder product of every step. SAELens' runner goes without its estimate of the rows' norm, which reads a thousand
batches first; it trains one SAE at a time.
"""

import time
from functools import partial

import pytest
import torch
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
from sae_lens.saes.topk_sae import TopKTrainingSAEConfig

from saeutils.lm import models, streams, text
from saeutils.lm.models import default_device
from saeutils.saes import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig
from saeutils.training import train

LM, LAYER, CONTEXT, BATCH, STEPS, D, K = "gemma-3-270m", 9, 128, 4096, 60, 640, 32
HOOK, TOKENS = f"blocks.{LAYER}.hook_resid_post", BATCH * STEPS
CASES = {"640 → 5,120": (5120, 1), "640 → 20,480": (20_480, 1), "eight of 640 → 5,120": (5120, 8)}


def floor(n: int, how_many: int) -> float:
    """Seconds: the LM over so many tokens, and so many encoder products; what is repeated is timed a few times only."""
    model, _ = models.load_hf(LM, layers=LAYER + 1)
    ids = torch.randint(5, 200_000, (15, 16, CONTEXT), device=model.device)
    x, W = torch.randn(BATCH, D, device=model.device), torch.randn(D, n, device=model.device)
    with torch.inference_mode():
        for counted in (False, True):  # the first warms up
            start = time.perf_counter()
            for batch in ids if counted else ids[:2]:
                model.model(batch, use_cache=False)
            lm = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(10):
            x @ W
        return lm / ids.numel() * TOKENS + (time.perf_counter() - start) / 10 * STEPS * how_many


def ours(n: int, how_many: int) -> None:
    data = text.load_text("wikipedia-summaries")
    batches = partial(streams.stream, LM, HOOK, data, batch_size=BATCH, context=CONTEXT, normalise="rms", centre=True, steps=STEPS)
    torch.manual_seed(0)
    cfg = SparseTopKTrainingSAEConfig(d_in=D, d_sae=n, k=K, device=default_device())
    train({str(i): SparseTopKTrainingSAE(cfg) for i in range(how_many)}, batches, STEPS, progress=False)


def saelens(n: int, _how_many: int) -> None:
    cfg = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=D, d_sae=n, k=K, device=default_device()), model_name=LM, hook_name=HOOK, dataset_path="text", is_dataset_tokenized=False,
        streaming=False, context_size=CONTEXT, training_tokens=TOKENS, train_batch_size_tokens=BATCH, store_batch_size_prompts=16, n_batches_in_buffer=32,
        device=default_device(), dtype="float32", n_checkpoints=0, logger=LoggingConfig(log_to_wandb=False), n_eval_batches=0, save_final_checkpoint=False,
    )  # fmt: skip
    LanguageModelSAETrainingRunner(cfg, override_dataset=text.load_text("wikipedia-summaries"), override_model=models.load_lm(LM)).run()


@pytest.mark.parametrize("row", CASES)
@pytest.mark.parametrize("who", ["ours", "SAELens"])
def test_text_to_sae(record, row, who):
    n, how_many = CASES[row]
    if who == "SAELens" and how_many > 1:
        pytest.skip("SAELens' runner trains one: so many times its first row")
    models.load_hf(LM, layers=LAYER + 1)  # the archive is fetched and converted
    before, start = floor(n, how_many), time.perf_counter()
    {"ours": ours, "SAELens": saelens}[who](n, how_many)
    seconds = time.perf_counter() - start
    record("text", f"{TOKENS:,} tokens of text to {row}, k {K}", who, seconds, floor=(before + floor(n, how_many)) / 2)
