"""Hook points, BOS, positions and final norms on random models of many architectures: names that are looked up go wrong here."""

import pytest
import tiny
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from saeutils import steering
from saeutils.analysis import features
from saeutils.lm import activations, collector, models, parts, tokens
from saeutils.saes import initializers

F32 = torch.float32
ADDS_OTHERWISE = {"granite", "bloom"}  # their MLP module's output is not what the stream gets


@pytest.fixture(scope="module", params=[name for name in tiny.SHAPES if name != "cohere"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind):
    return tiny.saved(kind)


@pytest.fixture(scope="module")
def lm(folder):
    return models.load_lm(folder, dtype=F32)


def _cache(lm, ids):
    with torch.no_grad():
        return lm.run_with_cache(ids)[1]


IDS = torch.randint(2, 250, (2, 12), generator=torch.Generator().manual_seed(0))


def test_collected_rows_are_the_hook_points(kind, folder, lm):
    cache = _cache(lm, IDS)
    for hook in ("blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"):
        if kind in ADDS_OTHERWISE and hook.endswith("mlp_out"):
            for dtype in (F32, torch.bfloat16):
                with pytest.raises(ValueError, match=f"in a {kind} block the MLP module's output is not what it adds"):
                    collector.Collector(folder, hook, dtype=dtype)
            continue
        got = collector.Collector(folder, hook, dtype=F32).forward(IDS)
        assert (got - cache[hook]).norm() < 1e-4 * cache[hook].norm(), hook


def test_what_the_mlp_adds_is_its_directions(kind, lm):
    cache = _cache(lm, IDS)
    before = cache["blocks.1.hook_resid_pre"] + cache["blocks.1.hook_attn_out"]  # in parallel blocks too
    added = cache["blocks.1.hook_resid_post"] - before
    try:
        U = initializers.mlp_directions(lm, 1)
    except ValueError as error:
        assert kind == "bloom", error  # its hook holds the whole stream
        return
    active = cache["blocks.1.mlp.out.hook_in"]
    out = lm.blocks[1].mlp.out.original_component
    gain = parts.mlp_gain(lm, 1, lm.blocks[1].mlp.W_out.float())
    written = active @ U + (out.bias * gain if getattr(out, "bias", None) is not None else 0)
    factor = (written * added).sum(-1, keepdim=True) / written.pow(2).sum(-1, keepdim=True)  # one number a token is a norm's
    assert (factor * written - added).norm() < 1e-3 * added.norm()


def test_promoted_tokens_are_those_of_the_final_norm(lm):
    torch.manual_seed(1)
    direction, x = torch.randn(32) + 1, torch.randn(2000, 32) * 20
    norm, head = lm.ln_final.original_component, lm.original_model.get_output_embeddings()
    with torch.no_grad():
        true = (head(norm(x + 0.01 * direction)).float() - head(norm(x)).float()).mean(0)
    got = features.promoted(lm, direction)
    assert torch.nn.functional.cosine_similarity(got, true - true.mean(), dim=0) > 0.999


def test_one_rule_for_bos(kind, folder, lm):
    _, words = models.load_hf(folder, dtype=F32)
    has = kind not in tiny.WITHOUT_BOS
    raw = words("Paris", add_special_tokens=False)["input_ids"]
    expected = [1] * has + raw
    assert tokens.encode(lm, "Paris")[0].tolist() == lm.to_tokens("Paris")[0].tolist() == expected
    assert steering.windows(lm, ["Paris"])[0] == expected
    windows = collector.tokenize(Dataset.from_list([{"text": "Paris"}]), words, 32, None, 0)
    assert windows.tokens == [expected]
    if has:
        assert tokens.encode(lm, "<bos>Paris")[0].tolist() == [1, *raw]  # a template's BOS is not doubled


def test_edits_act_on_every_real_token_of_this_call(kind, lm):
    hook, seen = "blocks.1.hook_resid_post", []
    look = (hook, lambda x, hook=None: seen.append(x.clone()))

    def moved(ids, edit):
        seen.clear()
        with torch.no_grad(), steering.edited(lm, [look, edit, look]):
            lm(ids)
        return ((seen[1] - seen[0])[0].norm(dim=1) > 1).tolist()

    edit = steering.add(hook, torch.full((32,), 30.0))
    bos = [False] * len(tokens.begin(lm))
    assert moved(tokens.encode(lm, "Paris"), edit) == bos + [True] * 5
    assert moved(tokens.encode(lm, "P"), edit) == [*bos, True]  # a single token after another call is not its continuation
    first = steering.add(hook, torch.full((32,), 30.0), positions=[0])
    texts = [steering.generate(lm, [p], [first], tokens=4) for p in ("a", "b")]
    assert steering.generate(lm, ["a", "b"], [first], tokens=4, batch_size=1) == [t[0] for t in texts]


def test_positions_are_counted_across_any_cache(lm):
    hook, seen = "blocks.1.hook_resid_post", []
    look = (hook, lambda x, hook=None: seen.append(x.clone()))
    edit = steering.add(hook, torch.full((32,), 30.0), positions=[6])
    ids, kw = torch.tensor([[5, 6, 7, 8, 9]]), dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with torch.no_grad(), steering.edited(lm, [look, edit, look]):
        lm.original_model.generate(ids, **kw)
    moved = [bool((b - a).norm() > 1) for a, b in zip(seen[::2], seen[1::2])]
    assert moved == [False, False, True, False]


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_a_bridge_that_computes_otherwise_is_refused(dtype):
    folder = tiny.saved("cohere")
    with pytest.raises(ValueError, match="bridge of cohere computes other logits than transformers, by"):
        models.load_lm(folder, dtype=dtype)
    model, _ = models.load_hf(folder, dtype=F32)
    with torch.no_grad():
        expected = model(IDS, output_hidden_states=True).hidden_states[2]
    got = collector.Collector(folder, "blocks.1.hook_resid_post", dtype=F32).forward(IDS)
    assert torch.allclose(got, expected, atol=1e-5)


def test_a_model_that_also_sees_is_collected_and_its_bridge_says_what_it_needs(monkeypatch):
    folder = tiny.sees()
    text = Dataset.from_list([{"text": "the quick brown fox"}])
    assert len(activations.collect(folder, "blocks.1.hook_resid_post", text, dtype=F32).all()["x"]) == 19
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="also sees, and its bridge needs torchvision: pip install torchvision"):
        models.load_lm(folder, dtype=F32)


@pytest.mark.parametrize("prefix, wrapper", [("_orig_mod.", "torch.compile"), ("module.", "DataParallel")])
def test_weights_under_other_names_are_refused(prefix, wrapper):
    folder = tiny.saved("llama")
    path = f"{folder}/model.safetensors"
    save_file({prefix + name: w for name, w in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks 30 weights \(lm_head.weight, .* …\); its names begin with '{prefix}', as {wrapper}'s"):
        models.load_hf(folder, dtype=F32)


def test_missing_weights_are_refused_and_tied_ones_are_not_missed():
    folder = tiny.saved("llama")
    path = f"{folder}/model.safetensors"
    weights = load_file(path)
    save_file({n: w for n, w in weights.items() if "layers.1.mlp.up" not in n}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights \(model.layers.1.mlp.up_proj.weight\)"):
        models.load_hf(folder, dtype=F32)
    models.load_hf(folder, dtype=F32, layers=1)  # what is not read is not missed
    tied = tiny.saved("llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(f"{tied}/model.safetensors")
    model, _ = models.load_hf(tied, dtype=F32)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_rounding_that_adds_up_is_no_other_architecture(monkeypatch):
    monkeypatch.setattr(parts, "tolerance", lambda dtype: 1e-3)  # of one block in bfloat16 it is more, of float32 less
    folder = tiny.saved("gemma3")
    assert models.load_lm(folder, dtype=torch.bfloat16).cfg.dtype == torch.bfloat16
    assert collector.Collector(folder, "blocks.2.hook_mlp_out", dtype=torch.bfloat16).model.dtype == torch.bfloat16
