"""Steering hooks against arithmetic done by hand on a real LM."""

import numpy as np
import pytest
import torch
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

from saeutils import steering
from saeutils.lm import models, tokens

HOOK = "blocks.3.hook_resid_post"


@pytest.fixture(scope="module")
def lm():
    return models.load_lm("gemma-3-270m", dtype=torch.float32)


def _sae(normalise="none", d=640):
    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=d, d_sae=256, k=16, normalize_activations=normalise))
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(256, d), dim=1))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


def _resid(lm, prompt, edits=()):
    with steering.edited(lm, edits), torch.no_grad():
        return lm.run_with_cache(prompt, names_filter=[HOOK])[1][HOOK][0]


PROMPT = "he is such a good man and everybody knows it"


def test_add_moves_every_token_but_the_sink(lm):
    before, direction = _resid(lm, PROMPT), torch.randn(640)
    after = _resid(lm, PROMPT, [steering.add(HOOK, direction, 3.0)])
    assert torch.equal(after[0], before[0])  # BOS
    assert torch.allclose(after[1:] - before[1:], (3 * direction).expand_as(after[1:]), atol=1e-2)


@pytest.mark.parametrize(
    "positions, moved", [([2], {2}), ([-1], {10}), (slice(3, 5), {3, 4}), (slice(-2, None), {9, 10})]
)
def test_positions(lm, positions, moved):
    before = _resid(lm, PROMPT)
    after = _resid(lm, PROMPT, [steering.add(HOOK, torch.ones(640), 5.0, positions)])
    changed = (after - before).abs().amax(1) > 1
    assert set(changed.nonzero()[:, 0].tolist()) == moved


@pytest.mark.parametrize("normalise", ["none", "layer_norm"])
def test_clamp_changes_one_latent_and_keeps_the_error_term(lm, normalise):
    sae, before = _sae(normalise), _resid(lm, PROMPT)
    acts = sae.encode(before[1:])
    value = 7.0
    after = _resid(lm, PROMPT, [steering.clamp(HOOK, sae, 11, value)])
    per_token = before[1:].std(dim=1, keepdim=True) if normalise == "layer_norm" else 1.0
    expected = (value - acts[:, 11:12]) * per_token * sae.W_dec[11]
    assert torch.allclose(
        after[1:] - before[1:], expected.detach(), rtol=1e-2, atol=2e-2 * float(expected.detach().abs().max())
    )


def test_scale_and_ablate_touch_only_active_latents(lm):
    sae, before = _sae(), _resid(lm, PROMPT)
    acts = sae.encode(before[1:])
    busy = int((acts > 0).sum(0).argmax())
    for edit, factor in ((steering.ablate(HOOK, sae, busy), -1.0), (steering.scale(HOOK, sae, busy, 3.0), 2.0)):
        moved = _resid(lm, PROMPT, [edit])[1:] - before[1:]
        assert torch.allclose(moved, factor * acts[:, busy : busy + 1] * sae.W_dec[busy], atol=2e-2)


def test_project_out_and_composition(lm):
    directions = torch.randn(3, 640)
    after = _resid(lm, PROMPT, [steering.add(HOOK, directions[0], 100.0), steering.project_out(HOOK, directions)])
    unit = torch.nn.functional.normalize(directions, dim=1)
    assert (after[1:] @ unit.T).abs().max() < 1e-2 * after[1:].norm(dim=1).mean()


def test_hooks_are_gone_after_an_exception(lm):
    before = _resid(lm, PROMPT)
    with pytest.raises(RuntimeError), steering.edited(lm, [steering.add(HOOK, torch.ones(640), 9.0)]):
        raise RuntimeError
    assert torch.equal(_resid(lm, PROMPT), before)


def test_generation_counts_positions_across_the_cache(lm):
    """Editing the first generated position only, with a cache, equals an uncached pass edited there."""
    prompt = "the weather today is"
    ids = lm.to_tokens(prompt)
    first = int(lm(ids)[0, -1].argmax())
    edit = steering.add(HOOK, torch.randn(640, generator=torch.Generator().manual_seed(1)), 100.0, [ids.shape[1]])
    with steering.edited(lm, [edit]), torch.no_grad():
        whole = lm(torch.cat([ids, torch.tensor([[first]])], 1))[0, -1].argmax()
    two = lm.tokenizer.decode([first, int(whole)], skip_special_tokens=True)
    assert steering.generate(lm, [prompt], [edit], tokens=2)[0][0] == two


def test_greedy_equals_uncached_passes_and_sampling_follows_the_distribution(lm):
    whole = ids = lm.to_tokens(PROMPT)
    for _ in range(6):  # the bridge's own generate shares our cache, and its faults
        whole = torch.cat([whole, lm(whole)[:, -1:].argmax(-1)], 1)
    assert torch.equal(steering.continued(lm, ids, 6), whole[:, ids.shape[1] :])
    small = models.load_lm("bilingual-lm/step-0004000")  # of a vocabulary that can be drawn from often
    ids = tokens.encode(small, "The girl went to")
    with torch.no_grad():
        p = (small(ids)[0, -1].float() / 0.7).softmax(-1)
        torch.manual_seed(0)
        drawn = steering.continued(small, ids.expand(2000, -1), 1, 0.7)[:, 0]
    top = p.topk(5)
    share = torch.stack([(drawn == i).float().mean() for i in top.indices])
    assert torch.allclose(share, top.values, atol=4 * float((top.values.max() / 2000) ** 0.5))


def test_sampling_is_seeded_and_batched():
    lm, prompts = models.load_lm("bilingual-lm/step-0004000"), ["he is", "the weather today is"]
    state = torch.get_rng_state()
    a = steering.generate(lm, prompts, tokens=5, temperature=0.7, samples=3, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert a == steering.generate(lm, prompts, tokens=5, temperature=0.7, samples=3, seed=1)
    assert a != steering.generate(lm, prompts, tokens=5, temperature=0.7, samples=3, seed=2)
    assert [len(r) for r in a] == [3, 3]
    loss = steering.continuation_loss(lm, prompts, a)
    assert loss.shape == (2, 3) and torch.isfinite(loss).all()


def test_losses_equal_the_formula_row_by_row(lm):
    rows = steering.windows(lm, [PROMPT, "Paris is the capital of France and its largest city.", "a word or two"], 9)
    edit = steering.add(HOOK, 30 * torch.randn(640, generator=torch.Generator().manual_seed(0)), positions=[2, 3])

    def naive(row, edits=()):  # of every token but the first, [position − 1]
        with steering.edited(lm, edits), torch.no_grad():
            return -lm(torch.tensor([row]))[0, :-1].log_softmax(-1)[range(len(row) - 1), row[1:]]

    for edits in ((), [edit]):
        expected = float(torch.cat([naive(r, edits) for r in rows]).mean())
        assert steering.mean_loss(lm, rows, edits, batch_size=2) == pytest.approx(expected, rel=1e-4)
    said = [["a fine day", "it"], ["", " of France"]]
    measured = steering.continuation_loss(lm, ["he is", "the capital"], said)
    for prompt, texts, found in zip(("he is", "the capital"), said, measured):
        for t, loss in zip(texts, found):
            tail = lm.tokenizer(t, add_special_tokens=False)["input_ids"]
            expected = (
                naive([*lm.to_tokens(prompt)[0].tolist(), *tail])[-len(tail) :].mean()
                if tail
                else torch.tensor(torch.nan)
            )
            assert float(loss) == pytest.approx(float(expected), rel=1e-4, nan_ok=True)


def test_loss_recovered_bounds(lm):
    texts = [PROMPT, "Paris is the capital of France and its largest city."]
    result = steering.loss_recovered(lm, _sae(), HOOK, texts)
    assert result["recovered"] <= 1.01 and result["zero"] != result["clean"]


def test_bad_input(lm):
    sae = _sae()
    with pytest.raises(ValueError, match="the dictionary has 0 to 255"):
        steering.clamp(HOOK, sae, 256, 1.0)
    with (
        pytest.raises(ValueError, match="no hook points"),
        steering.edited(lm, [steering.add("blocks.99.hook_resid_post", torch.ones(640))]),
    ):
        pass
    with pytest.raises(ValueError, match=r"prompts=.*: expected a list of texts, at least one"):
        steering.generate(lm, [])
    with pytest.raises(ValueError, match=r"the edit has d=32, .* has d=640"):
        _resid(lm, PROMPT, [steering.add(HOOK, torch.ones(32))])
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    with pytest.raises(ValueError, match=r"trained at blocks\.1"):
        steering.ablate(HOOK, sae, 1)


@pytest.mark.parametrize("positions, moved", [
    (2, [2]), (np.array([1, 3]), [1, 3]), (torch.tensor([0]), [0]), ([-1], [4]), (range(1, 3), [1, 2]), (slice(None, None, 2), [0, 2, 4]),
])  # fmt: skip
def test_positions_in_any_form(positions, moved):
    _, apply = steering.add("h", torch.ones(8), positions=positions)
    assert apply(torch.zeros(1, 5, 8))[0, :, 0].nonzero()[:, 0].tolist() == moved


@pytest.mark.parametrize("positions, message", [
    (slice(None, None, -1), "goes backwards"), (1.5, "whole numbers"), ([], "whole numbers"), ("all", "whole numbers"), ([True], "whole numbers"),
])  # fmt: skip
def test_positions_that_are_none(positions, message):
    with pytest.raises(ValueError, match=message):
        steering.add("h", torch.ones(8), positions=positions)


@pytest.mark.parametrize("directions, left", [
    ([[0, 0, 0, 2.0]], [1, 1, 1, 0]), ([[0, 0, 0, 1.0], [0, 0, 0, -5]], [1, 1, 1, 0]), ([[0.0] * 4], [1, 1, 1, 1]),
    ([[0, 0, 3, 0], [0.0] * 4, [0, 0, 1e-5, 1e-5]], [1, 1, 0, 0]), (torch.eye(4).repeat(2, 1).tolist(), [0, 0, 0, 0]),
])  # fmt: skip
def test_project_out_removes_the_span_and_no_more(directions, left):
    _, apply = steering.project_out("h", torch.tensor(directions), positions=None)
    assert torch.allclose(apply(torch.eye(4)[None])[0].diag(), torch.tensor(left).float(), atol=1e-5)
    with pytest.raises(ValueError, match="NaN or inf"):
        steering.project_out("h", torch.tensor([1.0, float("nan")]))


def test_generation_ends_at_the_end_token(monkeypatch):
    small = models.load_lm("bilingual-lm/step-0004000")
    whole = steering.generate(small, ["The girl went"], tokens=12)[0][0]
    ids = steering.continued(small, tokens.encode(small, "The girl went"), 12)[0].tolist()
    monkeypatch.setattr(small.original_model.generation_config, "eos_token_id", [ids[4], 10**6])
    cut = steering.generate(small, ["The girl went", "He said that it was"], tokens=12)
    assert cut[0][0] == small.tokenizer.decode(ids[: ids.index(ids[4])]) and whole.startswith(cut[0][0])
    assert steering.continued(small, tokens.encode(small, "The girl went"), 12).shape[1] == ids.index(ids[4]) + 1


@pytest.mark.parametrize("kw, message", [
    ({"prompts": "Paris is"}, "prompts='Paris is': expected a list of texts"), ({"tokens": 0}, "tokens=0"), ({"temperature": -1.0}, "temperature=-1.0"),
    ({"samples": 0}, "samples=0"), ({"tokens": 10**6}, "tokens with the prompt; .* reads"), ({"prompts": ["a", 3]}, "expected a list of texts"),
])  # fmt: skip
def test_generation_refuses(kw, message):
    small = models.load_lm("bilingual-lm/step-0004000")
    with pytest.raises(ValueError, match=message):
        steering.generate(small, **{"prompts": ["The"], "tokens": 2, **kw})


@pytest.mark.parametrize("positions", [[99], [-99], 99, slice(50, None), np.array([40, 41])])
def test_positions_that_never_come_are_an_error(lm, positions):
    edit = steering.add(HOOK, torch.randn(640), 3.0, positions)
    with pytest.raises(ValueError, match=r"positions=.* never came: the longest text had 1\d tokens, counted from 0"):
        _resid(lm, PROMPT, [edit])


def test_positions_that_come_while_text_is_written_are_none(lm):
    edit = steering.add(HOOK, torch.randn(640), 3.0, [6])
    steering.generate(lm, ["he is"], [edit], tokens=6)  # three tokens of its own
    with pytest.raises(ValueError, match=r"positions=\[6\] never came: the longest text had 4 tokens"):
        steering.generate(lm, ["he is"], [edit], tokens=2)
