"""Scales, runs and what variables may say."""

import pytest

from saeutils.kernels import jobs
from saeutils.notebook import scales

TABLE = {
    "smoke": dict(steps=1, tokens=10, seeds=[0, 1, 2, 3]),
    "laptop": dict(tokens=90, why="the experiment in small"),
    "overnight": dict(steps=50),
    "colab": dict(tokens=900),
    "paper": dict(steps=3),
}


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in ("SAEUTILS_CAP", "SAEUTILS_SEED", "SAEUTILS_SCALE", "SAEUTILS_KEEP"):
        monkeypatch.delenv(name, raising=False)


def test_overnight_and_colab_differ_from_laptop_never_from_each_other():
    got = {s: scales.choose(s, TABLE)[0] for s in scales.SCALES}
    assert [(got[s].steps, got[s].tokens) for s in scales.SCALES] == [(1, 10), (1, 90), (50, 90), (1, 900), (3, 900)]


def test_the_table_shows_what_differs_and_why():
    shown = scales.choose("laptop", TABLE)[1]
    assert list(shown.columns) == ["smoke", "laptop ← runs", "overnight", "colab", "paper"]
    assert shown.loc["tokens"].tolist() == [10, 90, "″", 900, "″"] and shown.loc["why", "laptop ← runs"] == "the experiment in small"
    assert shown.loc["steps"].tolist() == [1, "″", 50, 1, 3], "colab has laptop's steps, not those to its left"
    assert "why" not in scales.choose("smoke", {"smoke": dict(steps=1)})[1].index
    with pytest.raises(ValueError, match=r"scales \['lunch'\]"):
        scales.choose("smoke", {**TABLE, "lunch": {}})


def test_caps_cut_and_make_a_rehearsal(monkeypatch):
    assert not scales.rehearsal("paper") and scales.rehearsal("smoke")
    monkeypatch.setenv("SAEUTILS_CAP", "tokens=50,seeds=2")
    settings, _ = scales.choose("paper", TABLE)
    assert settings.tokens == 50 and settings.seeds == [0, 1] and scales.rehearsal("paper")


def test_which_scale_runs(monkeypatch):
    monkeypatch.setenv("SAEUTILS_SCALE", "colab")
    assert scales.current() == "colab" and scales.current("smoke") == "smoke"
    with pytest.raises(ValueError, match="unknown scale='huge': one of smoke"):
        scales.current("huge")


def test_two_runs_share_no_seed(monkeypatch):
    assert scales.seed(3) == 3 and scales.choose("smoke", TABLE)[0].run == 0
    monkeypatch.setenv("SAEUTILS_SEED", "1")
    assert scales.seed(3) == 1003 and scales.choose("smoke", TABLE)[0].run == 1
    with pytest.raises(ValueError, match="seeds 0 to 999"):
        scales.seed(1000)


@pytest.mark.parametrize("name, read, texts", [
    ("SAEUTILS_SCALE", scales.current, ["", " laptop", "Laptop", "labtop"]),
    ("SAEUTILS_SEED", scales.run, ["", " 1", "one", "-1", "1.5", "1000", "²"]),
    ("SAEUTILS_KEEP", scales.keep, ["", "yes", " 1", "2"]),
    ("SAEUTILS_CAP", jobs.caps, ["", " ", "tokens", "tokens=", "tokens=x", "tokens=1, docs=2", "tokens=1,", "tokens=-1", "tokens 4"]),
])  # fmt: skip
def test_blanks_and_typos_are_errors(monkeypatch, name, read, texts):
    for text in texts:
        monkeypatch.setenv(name, text)
        with pytest.raises(ValueError, match=f"{name} (is|has) "):
            read()
