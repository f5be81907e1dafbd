"""The collector against transformers' own hidden states; cache, resume, splits, stream."""

import types
from itertools import islice

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset, concatenate_datasets

from saeutils.kernels import files
from saeutils.lm import activations, collector, models, streams, text
from saeutils.lm.collector import Collector, Windows, parse_hook, pools, tokenize

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def wiki():
    return text.load_text("wikipedia-summaries", max_docs=150)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """An empty cache for activations; models and archives stay where they are."""
    real = files.cache_dir

    def cache_dir(*parts):
        if parts[0] != "activations":
            return real(*parts)
        folder = tmp_path.joinpath(*parts)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    monkeypatch.setattr(files, "cache_dir", cache_dir)
    return tmp_path


def _collect(data, **kw):
    return activations.collect(
        "gemma-3-270m", HOOK, data, **{"n_tokens": 6000, "context": 64, "dtype": torch.float32, **kw}
    )


def test_rows_are_hidden_states_of_their_tokens(wiki, cached):
    acts = _collect(wiki)
    rows = acts.all()
    model, tokenizer = models.load_hf("gemma-3-270m", layers=3, dtype=torch.float32)
    for doc in rows["doc"].unique()[:5].tolist():
        inside = rows["doc"] == doc
        ids = tokenizer(wiki[doc]["text"], add_special_tokens=False)["input_ids"]
        positions = rows["position"][inside]
        assert [ids[p] for p in positions] == rows["token"][inside].tolist()
        window = torch.tensor([[tokenizer.bos_token_id, *ids[:63]]])
        with torch.no_grad():
            expected = model(window, output_hidden_states=True).hidden_states[2][0]
        first = inside & (rows["position"] < 63)
        got, want = rows["x"][first], expected[1 + rows["position"][first].long()]
        assert (got - want).norm() <= 1e-3 * want.norm()


def test_mlp_hook_equals_the_bridge(wiki, cached):
    hook = "blocks.1.hook_mlp_out"
    collector = Collector("gemma-3-270m", hook, dtype=torch.float32)
    lm = models.load_lm("gemma-3-270m", layers=2, dtype=torch.float32)
    ids = lm.to_tokens(wiki[0]["text"])[:, :32]
    with torch.no_grad():
        expected = lm.run_with_cache(ids, names_filter=[hook])[1][hook]
    assert torch.allclose(collector.forward(ids), expected, atol=1e-3, rtol=1e-3)


def test_bos_and_outliers_are_dropped(wiki, cached):
    acts = _collect(wiki, outlier=1.5)
    norms = acts.all()["x"].norm(dim=1)
    assert (acts.all()["token"] != 2).all()  # BOS
    assert norms.max() <= 1.5 * 1.05 * norms.median()
    assert len(norms) < len(_collect(wiki).all()["x"])


def test_cache_key_covers_every_input(wiki, cached):
    few = {"n_tokens": 600}
    folder = _collect(wiki, **few).folder
    assert _collect(wiki, **few).folder == folder
    changed = [{"context": 32}, {"n_tokens": 500}, {"seed": 1}, {"dtype": torch.bfloat16}, {"outlier": 2.0}]
    folders = {_collect(wiki, **few | kw).folder for kw in changed} | {_collect(wiki.select(range(140)), **few).folder, folder}
    assert len(folders) == len(changed) + 2


def test_interrupted_and_damaged_collections_go_on(wiki, cached, monkeypatch):
    monkeypatch.setenv("SAEUTILS_CAP", "shard_tokens=1500")
    original, calls = Collector.rows, []

    def rows(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(Collector, "rows", rows)
    with pytest.raises(KeyboardInterrupt):
        _collect(wiki)
    acts = _collect(wiki)
    assert len(calls) - 1 == len(acts.meta["shards"]) >= 4  # two before the interruption, the others after
    whole = acts.all()
    shard = acts.folder / next(iter(acts.meta["shards"]))
    shard.write_bytes(shard.read_bytes()[:-10])
    before = len(calls)
    again = _collect(wiki)
    assert len(calls) == before + 1
    assert all(torch.equal(again.all()[k], whole[k]) for k in whole)


def test_splits_share_no_document_and_batches_are_shuffled(wiki, cached):
    acts = _collect(wiki)
    docs = [set(acts.sample(10**6, s)["doc"].tolist()) for s in activations.SPLITS]
    assert not (docs[0] & docs[1] or docs[0] & docs[2] or docs[1] & docs[2]) and all(docs)
    assert sum(acts.count(s) for s in activations.SPLITS) == len(acts.all()["x"])
    stream = acts.batches(256, seed=3)
    batches = [next(stream) for _ in range(40)]  # several epochs
    for start in (1, 17, 39):
        assert torch.equal(next(acts.batches(256, seed=3, start=start)), batches[start])
    assert not torch.equal(next(acts.batches(256, seed=4)), batches[0])
    first_epoch = torch.cat(batches[: acts.count() // 256])
    assert len(first_epoch.unique(dim=0)) > 0.99 * len(first_epoch)


def test_normalisation(wiki, cached):
    acts = _collect(wiki)
    assert torch.allclose(next(acts.batches(256, normalise="l2")).norm(dim=1), torch.ones(256), atol=1e-4)
    scaled = next(acts.batches(2048, normalise="scale", centre=True))
    assert scaled.norm(dim=1).mean() == pytest.approx(640**0.5, rel=0.1)
    assert scaled.mean(0).norm() < 0.3 * scaled.norm(dim=1).mean()


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "GPTNeoXForCausalLM", "LlamaForCausalLM", "Gemma3ForCausalLM"])
def test_windows_of_all_lengths_come_out_as_if_alone(kind, monkeypatch):
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    shape = dict(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=3, intermediate_size=64, num_key_value_heads=2
    )
    model = model_class(model_class.config_class(vocab_size=64, **shape, head_dim=8)).eval()
    monkeypatch.setattr(models, "load_hf", lambda *a, **k: (model, types.SimpleNamespace(bos_token_id=1, eos_token_id=None, pad_token_id=None)))
    collector = Collector("", HOOK, batch_tokens=64)
    g = torch.Generator().manual_seed(0)
    tokens = [[1, *torch.randint(2, 64, (n,), generator=g).tolist()] for n in (3, 31, 8, 15, 7, 22, 1, 90)]
    rows = collector.rows(range(len(tokens)), Windows(tokens, list(range(len(tokens))), [0] * len(tokens)), outlier=1e9)
    assert sorted(rows["doc"].tolist()) == [i for i, t in enumerate(tokens) for _ in t[1:]]
    for i, t in enumerate(tokens):
        inside = rows["doc"] == i
        assert rows["token"][inside].tolist() == t[1:] and rows["position"][inside].tolist() == list(range(len(t) - 1))
        alone = collector.forward(torch.tensor([t]))[0, 1:]
        torch.testing.assert_close(rows["x"][inside], alone, rtol=1e-4, atol=1e-5)


def test_stream_gives_the_same_kind_of_rows(wiki, monkeypatch):
    monkeypatch.setenv("SAEUTILS_CAP", "shard_tokens=2000")
    stream = streams.stream("gemma-3-270m", HOOK, wiki, batch_size=128, context=64, buffer=1, dtype=torch.float32)
    batches = [next(stream) for _ in range(3)]
    assert all(b.shape == (128, 640) and torch.isfinite(b).all() for b in batches)
    assert not torch.equal(batches[0], batches[1])


def test_stream_holds_its_pool_and_reads_no_further(wiki, monkeypatch):
    read, real = [], Dataset.select
    monkeypatch.setattr(Dataset, "select", lambda self, rows: (read.append(len(rows)), real(self, rows))[1])
    monkeypatch.setenv("SAEUTILS_CAP", "shard_tokens=2000")
    large = concatenate_datasets([wiki] * 60)  # 9,000 documents
    stream = streams.stream("gemma-3-270m", HOOK, large, batch_size=256, context=64, buffer=2)
    seen = torch.cat([next(stream) for _ in range(12)])
    assert sum(read) == 100  # tokenised as needed, a hundred at a time
    assert len(seen.unique(dim=0)) > 0.5 * len(seen)  # the corpus repeats itself, the pool does not give a row twice


@pytest.mark.parametrize("buffer, batch_size", [(1, 500), (1, 2000), (2, 1999), (3, 64)])
def test_stream_never_overflows_its_pool(wiki, monkeypatch, buffer, batch_size):
    monkeypatch.setenv("SAEUTILS_CAP", "shard_tokens=2000")
    stream = streams.stream("gemma-3-270m", HOOK, wiki, batch_size=batch_size, context=64, buffer=buffer)
    for batch in islice(stream, 30_000 // batch_size):
        assert batch.shape == (batch_size, 640)


def test_a_stream_that_knows_its_steps_makes_no_row_that_nobody_gets(wiki, monkeypatch):
    monkeypatch.setenv("SAEUTILS_CAP", "shard_tokens=1000")
    run, rows = [], collector.Collector.rows

    def noted(self, pool, windows, outlier):
        run.append((sum(map(len, windows.tokens)) - len(windows.tokens), set(windows.doc)))
        return rows(self, pool, windows, outlier)

    monkeypatch.setattr(collector.Collector, "rows", noted)
    train = set(np.flatnonzero(activations.split_of(torch.arange(len(wiki))).numpy() == 0))
    for buffer, steps in ((4, 9), (1, 9), (1, 1)):  # all in one pool; a pool that is emptied and filled again
        run.clear()
        made = list(streams.stream("gemma-3-270m", HOOK, wiki, batch_size=256, context=64, buffer=buffer, steps=steps))
        assert [len(batch) for batch in made] == [256] * steps
        assert len(torch.cat(made).unique(dim=0)) > 0.99 * 256 * steps, "no row is given twice"
        assert set().union(*(docs for _, docs in run)) <= train
        assert sum(tokens for tokens, _ in run) <= 1.02 * 256 * steps + streams.TOP_UP  # attention sinks are dropped, and made up for
    rest = list(streams.stream("gemma-3-270m", HOOK, wiki, batch_size=256, context=64, buffer=1, steps=9, start=4))
    again = list(streams.stream("gemma-3-270m", HOOK, wiki, batch_size=256, context=64, buffer=1, steps=9))
    assert all(torch.equal(a, b) for a, b in zip(rest, again[4:])) and len(rest) == 5


def test_stream_refuses_what_it_cannot_hold_or_never_finds(wiki):
    with pytest.raises(ValueError, match="buffer=0: expected a whole number of at least 1"):
        next(streams.stream("gemma-3-270m", HOOK, wiki, buffer=0))
    with pytest.raises(ValueError, match="unknown normalise='z'"):
        next(streams.stream("gemma-3-270m", HOOK, wiki, normalise="z"))
    empty = Dataset.from_dict({"text": [""]})
    with pytest.raises(ValueError, match="no tokens in documents for training"):
        next(streams.stream("gemma-3-270m", HOOK, empty))


def test_pools_keep_every_window_once(wiki):
    tokenizer = models.load_hf("gemma-3-270m", layers=1)[1]
    windows = tokenize(wiki, tokenizer, 32, 5000, 0)
    assert sum(len(t) - 1 for t in windows.tokens) == 5000
    assert sorted(i for pool in pools(windows, 0) for i in pool) == list(range(len(windows.tokens)))


def test_errors(wiki, cached):
    with pytest.raises(ValueError, match=r"unknown hook 'blocks\.1\.hook_z'"):
        _collect_hook("blocks.1.hook_z", wiki)
    with pytest.raises(ValueError, match="has 18 layers; cannot keep 41"):
        _collect_hook("blocks.40.hook_resid_post", wiki)
    with pytest.raises(ValueError, match="tokens, 90,000,000 were asked for: ask for fewer or add documents"):
        _collect(wiki, n_tokens=90_000_000)
    with pytest.raises(ValueError, match="the text has no tokens"):
        tokenize(Dataset.from_list([{"text": ""}]), models.load_hf("gemma-3-270m", layers=1)[1], 32, None, 0)
    acts = _collect(wiki)
    with pytest.raises(ValueError, match="fewer than one batch of 1,000,000"):
        next(acts.batches(1_000_000))
    with pytest.raises(ValueError, match="unknown normalise='z'"):
        next(acts.batches(8, normalise="z"))
    with pytest.raises(ValueError, match="unknown normalise='z'"):
        acts.scale(normalise="z")
    assert parse_hook("blocks.3.hook_mlp_out") == (3, "hook_mlp_out")


def _collect_hook(hook, data):
    return activations.collect("gemma-3-270m", hook, data, n_tokens=1000)


def test_nan_activations_are_named(wiki, cached, monkeypatch):
    monkeypatch.setattr(Collector, "forward", lambda self, ids: torch.full((*ids.shape, 640), float("nan")))
    with pytest.raises(ValueError, match=r"gave NaN or inf in torch\.float32"):
        _collect(wiki)
