"""The bilingual LM: disjoint halves, its tokenizer, training that resumes, checkpoints by step."""

import math

import pytest
import torch

from saeutils import steering
from saeutils.analysis import language
from saeutils.kernels import files
from saeutils.lm import models, pretraining, text
from saeutils.worlds import bilingual


@pytest.fixture(scope="module")
def halves() -> dict[str, list[str]]:
    return bilingual.split_pairs(text.load_text("tatoeba", max_docs=3000), held_out=100)[0]


@pytest.fixture(scope="module")
def tokenizer(halves):
    return bilingual.train_tokenizer([*halves["ja"], *halves["en"]], 1500)


def test_halves_never_share_a_pair():
    pairs = text.load_text("tatoeba", max_docs=5000)
    halves, heldout = bilingual.split_pairs(pairs, held_out=300)
    ja, en = set(halves["ja"]), set(halves["en"])
    for row in pairs:
        assert not (row["ja"] in ja and row["en"] in en)
    assert not ja & set(heldout["ja"]) and not en & set(heldout["en"])
    assert 150 < len(heldout) < 600 and 0.7 < len(ja) / len(en) < 1.5
    with pytest.raises(ValueError, match="too few to hold out"):
        bilingual.split_pairs(pairs, held_out=2000)


def test_tokenizer_gives_every_text_back(tokenizer):
    for sentence in ["I ate 12 apples, café 😀!", "今日はTシャツを買った。", "한국어"]:
        ids = tokenizer(sentence)["input_ids"]
        assert tokenizer.decode(ids) == sentence and tokenizer.bos_token_id not in ids
    assert all(len(t.strip("▁")) <= 1 for t in tokenizer.tokenize("in 2026") if any(c.isdigit() for c in t))


def test_rows_are_packed(tokenizer):
    encoded = tokenizer(["I eat.", "You eat."] * 50)["input_ids"]
    rows = bilingual.packed(encoded, tokenizer.bos_token_id, 16, seed=0)
    assert rows.shape[1] == 16 and int(rows[0, 0]) == tokenizer.bos_token_id
    assert not torch.equal(rows, bilingual.packed(encoded, tokenizer.bos_token_id, 16, seed=1))


def test_first_tokens(tokenizer):
    cut = bilingual.first_tokens(["I ate an apple and went home.", ""], tokenizer, 3)
    assert "I ate an apple and went home.".startswith(cut[0]) and len(tokenizer.tokenize(cut[0])) == 3 and cut[1] == ""


def test_of_long_texts_only_the_beginning_is_tokenised(tokenizer, monkeypatch):
    sentence = "I ate an apple and went home. "
    texts = [sentence * 200, "x" * 3 + " " * 900 + sentence * 9, sentence, ""] * 600
    whole = tokenizer(texts[:4], add_special_tokens=False, truncation=True, max_length=20, return_offsets_mapping=True)
    expected = [t[: max((end for _, end in spans), default=0)] for t, spans in zip(texts, whole["offset_mapping"])]
    longest, read = [], type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, texts, **o: longest.append(max(map(len, texts))) or read(self, texts, **o))
    assert bilingual.first_tokens(texts, tokenizer, 20) == expected * 600
    assert max(longest) <= 16 * 20 * 8 and min(longest) <= 16 * 20


def test_documents_of_two_languages_in_turn(tokenizer):
    found = bilingual.documents(["tatoeba"], tokenizer, 8, 40)["text"]
    assert [language.language_of(t) for t in found[:10]] == ["ja", "en"] * 5
    assert bilingual.documents(["tatoeba"], tokenizer, 8, 20, skip=20)["text"] == found[20:]
    one = bilingual.documents(["wikipedia-summaries"], tokenizer, 8, 6)["text"]
    assert len(one) == 6 and one[2:] == bilingual.documents(["wikipedia-summaries"], tokenizer, 8, 4, skip=2)["text"]
    with pytest.raises(ValueError, match=r"the texts should be 'ja' and are en"):
        bilingual.documents(["wikipedia-summaries", "wikipedia-summaries"], tokenizer, 8, 40)
    with pytest.raises(ValueError, match=r"documents, none after the first 900,000: ask for fewer"):
        bilingual.documents(["tatoeba"], tokenizer, 8, 40, skip=900_000)


def test_training_resumes_where_it_was_killed(tmp_path, halves, tokenizer, monkeypatch):
    keep = pretraining.keep
    size = dict(width=32, layers=2, heads=2, context=32, batch=8, lr=3e-3, device="cpu")
    docs = halves["ja"][:600] + halves["en"][:600]
    whole = bilingual.train_lm(tmp_path / "a", docs, tokenizer, steps=[0, 4, 8], **size)
    assert list(whole) == [0, 4, 8]
    monkeypatch.setattr(
        pretraining,
        "keep",
        lambda model, tok, folder: (
            (_ for _ in ()).throw(KeyboardInterrupt) if folder.name.endswith("8") else keep(model, tok, folder)
        ),
    )
    with pytest.raises(KeyboardInterrupt):
        bilingual.train_lm(tmp_path / "c", docs, tokenizer, steps=[0, 4, 8], **size)
    monkeypatch.undo()
    assert torch.load(tmp_path / "c" / "running.pt", weights_only=True)["step"] == 4
    bilingual.train_lm(tmp_path / "c", docs, tokenizer, steps=[0, 4, 8], **size)
    a, c = (models.load_hf(str(tmp_path / f / "step-0000008"), dtype=torch.float32, device="cpu")[0] for f in "ac")
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters()))
    with pytest.raises(ValueError, match="fill less than one batch"):
        bilingual.train_lm(tmp_path / "d", docs[:2], tokenizer, steps=[4], **size)


def test_the_shipped_model_speaks_both_languages():
    found = models.checkpoints(str(files.data_dir() / "bilingual-lm"))
    assert list(found) == [250, 1000, 4000]
    lm = models.load_lm(**found[4000], dtype=torch.float32, device="cpu")
    _, heldout = bilingual.split_pairs(text.load_text("tatoeba"), held_out=4000)
    for column in ("ja", "en"):
        rows = steering.windows(lm, list(heldout[column])[:30], 64)
        assert steering.mean_loss(lm, rows) < math.log(6000) - 3  # three nats better than any token alike
    logits = lm(torch.tensor([[0, 5, 6]]))
    hf, _ = models.load_hf(**found[4000], dtype=torch.float32, device="cpu")
    assert torch.allclose(logits, hf(torch.tensor([[0, 5, 6]])).logits, atol=1e-3)


def test_checkpoints_are_listed(tmp_path):
    for name in ("iter_0000010", "iter_0000100", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    assert list(models.checkpoints(str(tmp_path))) == [10, 100]
    assert models.checkpoints(str(tmp_path), [100]) == {100: {"name": str(tmp_path / "iter_0000100")}}
    with pytest.raises(ValueError, match=r"no checkpoint at steps \[7\]; found: \[10, 100\]"):
        models.checkpoints(str(tmp_path), [10, 7])
    with pytest.raises(ValueError, match="no folder"):
        models.checkpoints(str(tmp_path / "nowhere"))
    for name in ("step1000", "step0005000", "step-0000010", "iter_0000010", "step1000-tokens4B"):
        assert models.STEP.match(name)
    assert not models.STEP.match("main")


def test_another_tokenizer_is_refused(tmp_path, halves):
    size = dict(width=32, layers=2, heads=2, context=32, batch=8, lr=3e-3, device="cpu")
    small = bilingual.train_tokenizer(halves["en"], 600)
    bilingual.train_lm(tmp_path, halves["en"][:300], small, steps=[1], **size)
    bilingual.train_tokenizer([*halves["ja"], *halves["en"]], 1500).save_pretrained(tmp_path / "step-0000001")
    with pytest.raises(ValueError, match="the tokenizer has 1,500 tokens, the model 600"):
        models.load_hf(str(tmp_path / "step-0000001"))
