import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from saeutils.lm import activations, adapters, models, pretraining
from tests import tiny

IDS = torch.arange(2, 18)[None]  # [1, position]


@pytest.fixture(scope="module")
def folder():
    return tiny.saved("gemma3")


def _plain(folder, **load):
    return models.load_hf(str(folder), dtype=torch.float32, device="cpu", **load)[0]


def _adapted(folder, tmp_path, kind="step-0000001"):
    """A model whose adapter does something, and the folder that keeps it."""
    model, tokenizer = models.load_hf(folder, dtype=torch.float32, device="cpu")
    adapters.add(model, folder, rank=4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and "lora_B" in name:
                weight.copy_(torch.randn(weight.shape).bfloat16())
            elif weight.requires_grad:
                weight.copy_(weight.bfloat16())
    pretraining.keep(model, tokenizer, tmp_path / kind)
    return model, tmp_path / kind


def test_a_new_adapter_changes_nothing_and_is_the_same_for_one_seed(folder):
    plain, other = _plain(folder), _plain(folder)
    with torch.no_grad():
        before, state = plain(IDS).logits, torch.get_rng_state()
        one, other = (adapters.add(model, folder, rank=4, seed=3) for model in (plain, other))
        assert torch.equal(torch.get_rng_state(), state)
        torch.testing.assert_close(one(IDS).logits, before)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters()))
    learned = [name for name, weight in one.named_parameters() if weight.requires_grad]
    assert len(learned) == 2 * 7 * 3 and all("lora_" in name for name in learned)  # A and B of seven maps in three blocks


def test_a_kept_adapter_is_merged_into_its_model(folder, tmp_path):
    model, kept = _adapted(folder, tmp_path)
    assert sorted(f.name for f in kept.iterdir()) == [adapters.CONFIG, adapters.WEIGHTS]
    assert list(models.checkpoints(str(tmp_path))) == [1]
    merged, tokenizer = models.load_hf(str(kept), dtype=torch.float32, device="cpu")
    assert type(merged) is type(_plain(folder)) and tokenizer.vocab_size
    with torch.no_grad():
        wanted = model(IDS).logits
        assert (wanted - _plain(folder)(IDS).logits).norm() > 0.1 * wanted.norm()
        torch.testing.assert_close(merged(IDS).logits, wanted, atol=1e-3, rtol=1e-3)
        bridge = models.load_lm(str(kept), dtype=torch.float32, device="cpu")
        torch.testing.assert_close(bridge(IDS), wanted, atol=1e-3, rtol=1e-3)
        first = _plain(kept, layers=1)
    weight = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first.state_dict()[weight], merged.state_dict()[weight])


def test_an_adapter_is_a_model_wherever_a_name_is_taken(folder, tmp_path, monkeypatch):
    model, kept = _adapted(folder, tmp_path)
    assert models.load_tokenizer(str(kept)).get_vocab() == models.load_tokenizer(folder).get_vocab()
    assert models.identity(str(kept)).endswith(models.identity(folder)) and models.identity(str(kept)) != models.identity(folder)
    text = "an adapter is read like any other model"
    acts = activations.collect(str(kept), "blocks.1.hook_resid_post", Dataset.from_dict({"text": [text]}), outlier=1e6, dtype=torch.float32, device="cpu")
    ids = torch.tensor([[1, *models.load_tokenizer(folder)(text, add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        wanted = model(ids, output_hidden_states=True).hidden_states[2][0, 1:]  # [position, d], BOS left out
    torch.testing.assert_close(acts.all()["x"], wanted, atol=1e-3, rtol=1e-3)
    monkeypatch.setattr(models.files, "data_dir", lambda: tmp_path)
    assert models.located(kept.name) == str(kept)
    torch.testing.assert_close(_plain(kept.name)(IDS).logits, _plain(kept)(IDS).logits)


def test_bad_adapters_are_refused(folder, tmp_path):
    _, kept = _adapted(folder, tmp_path)
    state = load_file(kept / adapters.WEIGHTS)
    save_file(dict(list(state.items())[3:]), kept / adapters.WEIGHTS)
    with pytest.raises(ValueError, match=r"lacks 3 weights .*is it of another model"):
        models.load_hf(str(kept))
    (kept / adapters.WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors: save the adapter again"):
        models.load_hf(str(kept))
    (kept / adapters.WEIGHTS).touch()
    config = json.loads((kept / adapters.CONFIG).read_text())
    (kept / adapters.CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not say which model it adapts"):
        models.load_lm(str(kept))


def test_training_an_adapter_leaves_the_model_and_resumes(folder, tmp_path, monkeypatch):
    wanted = torch.ones(1, 16, dtype=torch.bool)

    def batches(at):
        while True:
            yield IDS + at % 3, wanted
            at += 1

    def run(home: Path) -> torch.nn.Module:
        model, tokenizer = models.load_hf(folder, dtype=torch.float32, device="cpu")
        adapters.add(model, folder, rank=4)
        pretraining.fit(home, model, tokenizer, batches, [6], 1e-2, of={"a": 1}, every=2)
        return model

    plain, model = _plain(folder), run(tmp_path / "a")
    assert torch.equal(model.model.layers[0].mlp.up_proj.base_layer.weight, plain.model.layers[0].mlp.up_proj.weight)
    state = torch.load(tmp_path / "a" / "running.pt", weights_only=True)
    assert all("lora_" in name for name in state["model"])
    monkeypatch.setattr(pretraining, "keep", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "step-0000006")
    (tmp_path / "b" / "running.pt").unlink()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b")
    monkeypatch.undo()
    assert torch.load(tmp_path / "b" / "running.pt", weights_only=True)["step"] == 4
    run(tmp_path / "b")
    a, b = (load_file(tmp_path / f / "step-0000006" / adapters.WEIGHTS) for f in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
