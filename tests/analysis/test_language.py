"""Language and granularity from plain lists of (token, activation): every class, every trap."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saeutils.analysis import embeddings, language
from saeutils.kernels import files
from saeutils.notebook import widgets


def _text(*tokens: str) -> list[tuple[str, float]]:
    """The token marked with a leading ! is the peak."""
    return [(t.removeprefix("!"), 2.0 if t.startswith("!") else 0.1) for t in tokens]


@pytest.mark.parametrize("string, expected", [
    ("cat", "en"), ("café", "en"), ("naïve", "en"), ("Łódź", "en"), ("é", "en"), ("cafe\u0301", "en"),
    ("猫", "ja"), ("ネコ", "ja"), ("ねこ", "ja"), ("ｶﾞ", "ja"), ("ー", "ja"), ("々", "ja"), ("ラーメン", "ja"),
    ("123", ""), ("１２３", ""), ("%", ""), (":", ""), ("。", ""), ("「」", ""), ("・", ""), (" ", ""), ("\u3000", ""), ("", ""),
    ("😀", ""), ("👨‍👩‍👧", ""), ("\ufffd", ""), ("привет", "other"), ("한국", "other"),
    ("Tシャツ", "ja"), ("iPhoneを買った", "ja"), ("I love 寿司 very much", "en"), ("Ａ", "en"), ("ＮＨＫを見る", "ja"),
])  # fmt: skip
def test_language_of_a_string(string, expected):
    assert language.language_of(string) == expected


@pytest.mark.parametrize("tokens, expected", [
    (["▁the", "▁cat"], [" the", " cat"]),
    (["Ġthe", "Ġcat"], [" the", " cat"]),
    (["ãģ¾", "ãģ"], ["ま", "\ufffd"]),  # ま, then a character cut off
    (["caf", "Ã©"], ["caf", "é"]),
    (["café"], ["café"]),
    (["Ł", "ó", "d", "ź"], ["Ł", "ó", "d", "ź"]),
    (["<0xE7>", "<0x8C>", "<0xAB>"], ["\ufffd"] * 3),
    ([], []),
])  # fmt: skip
def test_pieces(tokens, expected):
    assert language.pieces(tokens)[0] == expected


def test_byte_level_text_is_read_whole():
    assert (
        language.pieces(["ç", "Į", "«"])[1] == "猫"
    )  # one character over three tokens: no piece has a letter, the text has


@pytest.mark.parametrize("texts, expected", [
    ([_text("!cat"), _text("a", "!dog")], "en"),
    ([_text("!猫"), _text("の", "!犬")], "ja"),
    ([_text("!猫"), _text("!cat")], "mixed"),
    ([_text("!cat")] * 9 + [_text("!猫")], "en"),
    ([_text("!cat")] * 8 + [_text("!猫")] * 2, "mixed"),
    ([_text("!1", "年"), _text("!。", "猫")], "ja"),  # neutral peaks: the text decides
    ([_text("!%", "of", "them"), _text("!:", "é")], "en"),
    ([_text("!1", "2"), _text("!cat")], "en"),  # a text without letters does not vote
    ([_text("!1"), _text("!。")], "mixed"),
    ([_text("!é"), _text("!à")], "en"),
    ([_text("!😀", "楽しい"), _text("!\ufffd", "日本")], "ja"),
    ([[], [("", 0.0)], _text("!cat")], "en"),
    ([_text("!ãģ", "¾", "ãģ¾"), _text("!ç", "Į", "«")], "ja"),  # fragments of kana
    ([_text("!привет")], "other"),
])  # fmt: skip
def test_language_tendency(texts, expected):
    assert language.language_tendency(texts) == expected
    assert language.language_tendency([texts, texts]) == [expected] * 2


def test_wrong_language_is_refused():
    language.require(["I eat.", "You eat.", "1"] * 5 + ["He eats."] * 10, "en")
    with pytest.raises(ValueError, match="should be 'ja' and are en 67%, ja 33%"):
        language.require(["I eat.", "You eat.", "食べる。"], "ja")
    with pytest.raises(ValueError, match="are none"):
        language.require([], "ja")


def test_language_tendency_needs_a_peak():
    with pytest.raises(ValueError, match="no text with a positive activation"):
        language.language_tendency([[("cat", 0.0)], []])


@given(st.lists(st.lists(st.tuples(st.text(max_size=4), st.floats(0, 5)), max_size=5), min_size=1, max_size=6))
def test_any_text_has_an_answer_or_an_error(texts):
    if any(a > 0 for text in texts for _, a in text):
        assert language.language_tendency(texts) in ("ja", "en", "other", "mixed")
    else:
        with pytest.raises(ValueError):
            language.language_tendency(texts)


CAT = [_text("▁the", "!▁cat", "▁sleeps"), _text("▁my", "!▁cat"), _text("▁a", "▁black", "!▁cat", "▁ran"), _text("!Cat", "s"), _text("▁no", "!▁cat", "▁here")]  # fmt: skip
MEANING = [_text("▁the", "!▁cat", "▁sleeps"), _text("!猫", "が", "寝", "て", "いる"), _text("その", "!ネコ", "は", "黒い"), _text("▁a", "!▁kitty", "▁ran"), _text("▁my", "!▁cat"), _text("!猫", "です")]  # fmt: skip
ANIMALS = [_text("▁the", "!▁cat", "▁sleeps"), _text("!犬", "が", "走る"), _text("▁a", "!▁horse", "▁ran"), _text("!鳥", "が", "飛ぶ"), _text("▁my", "!▁cow"), _text("!魚", "を", "食べる")]  # fmt: skip
NOTHING = [_text("!▁of", "▁the", "▁law"), _text("昨日", "!経済", "が"), _text("▁she", "▁smiled", "!."), _text("!12", "▁dogs"), _text("私", "!は", "医者"), _text("▁Mon", "!day", "▁is", "▁over")]  # fmt: skip


@pytest.mark.parametrize(
    "texts, expected", [(CAT, "token"), (MEANING, "synonym"), (ANIMALS, "semantic"), (NOTHING, "unrelated")]
)
def test_granularity(texts, expected):
    assert language.granularity(texts) == expected
    assert language.granularity(language.signals([texts])) == [expected]


def test_signals_of_extremes():
    same, mixed = language.signals([CAT, NOTHING])
    named = dict(zip(language.SIGNALS, same))
    assert named["same"] == 1 and named["spread"] == pytest.approx(0) and named["kin"] == 1 and named["bilingual"] == 0
    assert dict(zip(language.SIGNALS, mixed))["same"] == pytest.approx(1 / 6)
    with pytest.raises(ValueError, match=r"latents \[0\] have fewer than two texts"):
        language.granularity([_text("!cat")])


def test_words_are_put_together():
    assert language._word([" the", " ho", "rse", "s", "!"], 2) == "horses"
    assert language._word([" 日本", "語", "です"], 1) == "語"
    assert language._word(["", "!"], 0) == ""


def test_shipped_labels_are_whole():
    labels = json.loads((files.data_dir() / "granularity_labels.json").read_text())
    assert len(labels) >= 200 and {entry["label"] for entry in labels} == set(language.GRANULARITIES)
    assert all(len(entry["texts"]) >= 2 for entry in labels)


def test_multilingual_embeddings_know_translations():
    x = embeddings.multilingual(["猫", "cat", "戦争", "war", "経済の問題", "an economic problem"]).numpy()
    cosines = x @ x.T
    assert np.allclose(np.diag(cosines), 1, atol=1e-5)
    assert [int((row * (1 - np.eye(6)[i])).argmax()) for i, row in enumerate(cosines)] == [1, 0, 3, 2, 5, 4]
    one = embeddings.multilingual(["war"]).numpy()
    assert np.allclose(one[0], x[3], atol=1e-5)  # padding does not show


def test_label_panel_saves_resumes_and_compares(tmp_path):
    queue = {f"{i}": texts for i, texts in enumerate((CAT, MEANING, ANIMALS, NOTHING))}
    automatic = {"0": "token", "1": "synonym", "2": "semantic", "3": "unrelated"}
    path = tmp_path / "me.json"
    panel = widgets.label_panel(queue, path, automatic)
    buttons, state, texts = panel.children
    assert "0 of 4 labelled" in state.value and "<span" in texts.value and "checkpoint" not in texts.value
    buttons.children[0].click()  # token
    assert list(json.loads(path.read_text()).values()) == ["token"]
    buttons.children[4].value = "u"  # by key
    assert "2 of 4 labelled" in state.value and "κ with automatic" in state.value and buttons.children[4].value == ""
    again = widgets.label_panel(queue, path, automatic, {"other": path})
    assert "2 of 4 labelled" in again.children[1].value and "κ with other" in again.children[1].value
    again.children[0].children[5].click()  # back
    assert "1 of 4 labelled" in again.children[1].value and len(json.loads(path.read_text())) == 1
    for _ in range(4):
        again.children[0].children[2].click()
    assert "all done" in again.children[2].value
    path.write_text("")
    with pytest.raises(ValueError, match="not a label file"):
        widgets.label_panel(queue, path, automatic)
    with pytest.raises(ValueError, match="no latents to label"):
        widgets.label_panel({}, path, automatic)
