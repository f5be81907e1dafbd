"""The explorer without a browser, on a small LM and an SAE that plain SAELens trained; what it writes is what generate writes."""

import copy
import itertools

import pytest
import torch
from sae_lens import SAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

from saeutils import steering
from saeutils.analysis import features, index
from saeutils.lm import models
from saeutils.notebook import explorer
from saeutils.notebook.widgets import drawing, writing

HOOK = "blocks.2.hook_resid_post"
TEXTS = ["The girl went to school with her brother.", "He said that it was too late.", "Why did you open the window?", "犬が走っています。"] * 8


@pytest.fixture(scope="module")
def small():
    return models.load_lm("bilingual-lm/step-0004000")


@pytest.fixture(scope="module")
def plain(small, tmp_path_factory) -> SAE:
    """Trained by SAELens' own class and trainer, saved and loaded by it."""
    with torch.no_grad():
        x = torch.cat([features.residual(small, HOOK, small.to_tokens(t))[0, 1:].float() for t in TEXTS])
    torch.manual_seed(0)
    cfg = TopKTrainingSAEConfig(d_in=x.shape[1], d_sae=512, k=8, metadata=SAEMetadata(hook_name=HOOK, model_name="another name"))
    sae = TopKTrainingSAE(cfg)
    rows = itertools.repeat(x.repeat(4, 1)[:256])
    settings = dict(n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, lr_warm_up_steps=0, lr_decay_steps=0, n_restart_cycles=1)
    trainer = SAETrainer(
        SAETrainerConfig(total_training_samples=256 * 60, train_batch_size_samples=256, lr=1e-2, lr_end=1e-2, lr_scheduler_name="constant",
                         device="cpu", autocast=False, feature_sampling_window=1000, dead_feature_window=1000, adam_beta1=0.9, adam_beta2=0.999, logger=_no_log(), **settings),
        sae, rows,
    )  # fmt: skip
    trainer.fit()
    folder = tmp_path_factory.mktemp("plain")
    sae.save_inference_model(str(folder))
    return SAE.load_from_disk(str(folder))


def _no_log():
    from sae_lens.config import LoggingConfig

    return LoggingConfig(log_to_wandb=False)


@pytest.fixture
def opened(small, plain) -> explorer.Explorer:
    found = explorer.Explorer(small, plain, None, TEXTS)
    found.begin([], "The girl went to school.", "The girl went", 0.5)
    return found


def _done(panel: explorer.Explorer) -> str:
    panel.worker.wait(30)
    return panel.worker.status.value


def test_a_sentence_its_tokens_and_their_latents(opened, small, plain):
    assert [b.description.strip() for b in opened.buttons if b.layout.display == ""] == ["The", "girl", "went", "to", "school", "."]
    opened.buttons[1].click()
    _done(opened)
    with torch.no_grad():
        x = features.residual(small, HOOK, small.to_tokens("The girl went to school."))[0, 2:3].float()
        best = plain.encode(x)[0].topk(8)
    assert [i for _, i in opened.strongest.options] == best.indices.tolist()
    opened.strongest.value = opened.strongest.options[2][1]
    _done(opened)
    assert opened.latent == best.indices[2] and f"latent {opened.latent}" in opened.card.value
    seen = opened.latent
    opened.near[0].click()
    _done(opened)
    assert opened.latent != seen
    opened.back.click()
    _done(opened)
    assert opened.latent == seen


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("mode", writing.MODES)
def test_the_text_shown_is_what_generate_gives(opened, small, plain, mode, temperature):
    with opened._set():
        opened.heat.value = temperature
        for slot, latent, by in zip(opened.slots, (3, 17), (1.5, -0.7)):
            slot[0].value, slot[1].value, slot[2].value = mode, latent, by
    opened.ask()
    assert "color:#666'></span>" in _done(opened)
    setting = opened.setting()
    given = writing.edits(plain, HOOK, setting, opened.unit, opened._typical)
    texts = [
        steering.generate(small, [setting.prompt], edits, tokens=setting.tokens, temperature=temperature, seed=setting.seed)[0][0]
        for edits in ([], given, writing.control(small, HOOK, setting, given))
    ]
    assert opened.text.value == drawing.comparison(setting.prompt, dict(zip(("before", "after", "random direction"), texts)))


def test_the_random_direction_moves_as_far(small, plain):
    setting = writing.Setting("The girl went", (("add", 3, 0.8), ("add", 4, 0.5)))
    given = writing.edits(plain, HOOK, setting, 100.0, lambda latent: 1.0)
    ids = small.to_tokens(setting.prompt)
    plain_x = features.residual(small, HOOK, ids)
    moved = [(features.residual(small, HOOK, ids, e) - plain_x)[0, 1:].float().norm(dim=1) for e in (given, writing.control(small, HOOK, setting, given))]
    assert torch.allclose(*moved, rtol=0.02)


def test_a_slider_moved_while_text_is_written_and_undo(opened):
    first = opened.setting()
    for by in (0.6, 0.7, 0.8, 0.9):
        opened.slots[0][2].value = by
    _done(opened)
    assert [s.slots[0][2] for s, *_ in opened.past] == [0.5, 0.9]
    opened.acts["another sample"].click()
    _done(opened)
    assert (opened.setting().seed, opened.setting().temperature) == (1, 0.7)
    for _ in range(3):
        opened.acts["undo"].click()
        _done(opened)
    assert opened.setting() == first and opened.text.value == opened.past[0][1]
    opened.slots[0][2].value = 1.0
    opened.acts["undo"].click()  # before that text was written
    _done(opened)
    assert opened.setting() == first and len(opened.past) == 3  # the list stays


@pytest.mark.parametrize("text", ["", "   ", "\n", "日本語の文です。", "😀🎉 emoji", "<script>alert(1)</script>", "word " * 2000, "a" * 10_000, "\x00\u202e"])
def test_anything_can_be_typed(opened, text):
    opened.sentence.value = opened.prompt.value = text
    said = _done(opened)
    assert "Traceback" not in said and "<script>" not in opened.static()
    opened.sentence.value, opened.prompt.value = "The girl", "The girl"
    assert "color:#666" in _done(opened) and "The girl" in opened.text.value


@pytest.mark.parametrize("act, said", [
    (lambda e: setattr(e.number, "value", 99_999), "latent=99999: the dictionary has 0 to 511"),
    (lambda e: setattr(e.slots[0][1], "value", -1), "latent=-1: the dictionary has 0 to 511"),
    (lambda e: setattr(e.search, "value", "unbelievable"), "tokens: searched for the first"),
    (lambda e: setattr(e.search, "value", "  "), "type a word to search for"),
    (lambda e: setattr(e.prompt, "value", " "), "write a prompt first"),
    (lambda e: setattr(e.prompt, "value", "word " * 999), "shorten it to 200"),
    (lambda e: setattr(e.sentence, "value", "word " * 99), "the first 64 of"),
])  # fmt: skip
def test_bad_input_is_a_sentence_and_the_panel_stays_usable(opened, act, said):
    act(opened)
    assert said in _done(opened)
    opened.acts["reset"].click()
    opened.open(5)
    _done(opened)
    assert opened.latent == 5 and "saeutils-old" not in opened.text._dom_classes


def test_what_cannot_be_explored_is_refused_at_the_door(small, plain):
    other = TopKSAE(TopKSAEConfig(d_in=7, d_sae=16, k=2, metadata=SAEMetadata(hook_name=HOOK)))
    with pytest.raises(ValueError, match="the SAE reads 7 dimensions"):
        explorer.show(small, other, texts=TEXTS)
    with pytest.raises(ValueError, match=r"has no hook point 'blocks\.99\.hook_resid_post': give hook="):
        explorer.show(small, plain, hook="blocks.99.hook_resid_post", texts=TEXTS)
    with pytest.raises(ValueError, match="no texts to search"):
        explorer.show(small, plain, texts=["", " "])


def test_the_index_is_kept_by_all_that_it_depends_on(small, plain, tmp_path, monkeypatch):
    monkeypatch.setenv("SAEUTILS_CACHE", str(tmp_path))
    table, unit = index.indexed(small, plain, HOOK, TEXTS)
    again, same = index.indexed(small, plain, HOOK, TEXTS)
    assert unit == same and (table.acts != again.acts).nnz == 0 and len(list((tmp_path / "index").iterdir())) == 1
    with torch.no_grad():
        plain.b_enc += 1e-3
        index.indexed(small, plain, HOOK, TEXTS)
        plain.b_enc -= 1e-3
    elsewhere = copy.deepcopy(plain)
    elsewhere.cfg.metadata.hook_name = None
    index.indexed(small, elsewhere, "blocks.1.hook_resid_post", TEXTS)
    index.indexed(small, plain, HOOK, TEXTS[1:])
    index.indexed(models.load_lm("bilingual-lm/step-0001000"), plain, HOOK, TEXTS)
    assert len(list((tmp_path / "index").iterdir())) == 5


def test_index_equals_encoding_a_text_by_hand(small, plain):
    table, _ = index.indexed(small, plain, HOOK, TEXTS)
    doc = 1
    with torch.no_grad():
        x = features.residual(small, HOOK, small.to_tokens(TEXTS[doc]))[0, 1:].float()
        expected = plain.encode(x)
    rows = slice(*table.edges[doc : doc + 2])
    assert table.token[rows].tolist() == small.to_tokens(TEXTS[doc])[0, 1:].tolist()
    assert torch.allclose(torch.tensor(table.acts.tocsr()[rows].toarray()), expected, atol=2e-2 * float(expected.max()))


def test_marked_words_keep_their_blanks():
    assert drawing.marked(" a b\n c", " a x\n c").replace("<mark style='background:#ffe0b0'>", "[").replace("</mark>", "]") == " a[ b]\n c"
    assert drawing.visible(" \n") == "␣↵" or drawing.visible(" \n").strip()
