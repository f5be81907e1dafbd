"""The ledger: what it refuses, what it keeps, what of two runs comes into README."""

import pytest

from saeutils.notebook import claims
from saeutils.notebook.claims import Ledger, at_least, at_most, between

HIGH, LOW, PASSES = [0.91, 0.93, 0.92], [0.1, 0.2, 0.12], at_least(0.8)


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    """A function that starts a kept run in an empty checkout: ``ledger(scale, run)``."""
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAEUTILS_KEEP", "1")
    monkeypatch.setenv("SAEUTILS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SAEUTILS_CAP", raising=False)

    def start(scale="laptop", run=0, notebook="09_x"):
        monkeypatch.setenv("SAEUTILS_SEED", str(run))
        return Ledger(notebook, scale)

    return start


def _judge(ledger, claim="it works", values=HIGH, bar=PASSES, control=LOW, **more):
    return ledger.judge(claim, source="figure 2", paper="yes", values=values, bar=bar, control=control, **more)


def _kept():
    return claims.all_claims()


def test_a_row_says_all_that_the_rule_saw(ledger):
    said = _judge(ledger(), ceiling=[0.99, 0.98, 0.97], note="three seeds")
    assert said.startswith("yes: it works (3 units, beyond bar and control; 0.92 [")
    (row,) = _kept().to_dict("records")
    assert list(row) == [*claims.COLUMNS, "notebook"]
    assert (row["holds"], row["units"], row["scale"], row["run"], row["bar"]) == ("yes", 3, "laptop", 0, "at least 0.8")
    assert row["here"] == 0.92 and row["low"] < 0.92 < row["high"] and row["control_low"] < row["control"] < row["control_high"]
    assert row["ceiling"].startswith("0.98 [") and row["machine"] and row["date"] and row["note"] == "three seeds"


def test_rows_of_other_scales_and_runs_stay(ledger):
    for scale, run in (("laptop", 0), ("laptop", 1), ("overnight", 0), ("overnight", 1), ("laptop", 0)):
        _judge(ledger(scale, run))
    assert sorted(zip(_kept()["scale"], _kept()["run"])) == [("laptop", 0), ("laptop", 1), ("overnight", 0), ("overnight", 1)]
    again = ledger("laptop", 0)
    _judge(again, "another claim")  # the old claim of this run is gone
    assert set(_kept()[lambda t: (t["scale"] == "laptop") & (t["run"] == 0)]["claim"]) == {"another claim"}


def test_readme_takes_the_largest_scale_of_each_run_and_both_must_agree(ledger):
    _judge(ledger("laptop", 0))
    assert claims.judged(_kept())[["holds", "why"]].values.tolist() == [["cannot tell", "one run only"]]
    _judge(ledger("laptop", 1), values=[0.1, 0.9, 0.5])
    assert claims.judged(_kept())["why"].tolist() == ["the two runs disagree: yes, cannot tell"]
    _judge(ledger("overnight", 1))
    (row,) = claims.judged(_kept()).to_dict("records")
    assert row["holds"] == "yes" and row["both"].count("[") == 2 and row["scale"] == "laptop; overnight"


def test_a_bar_changed_later_is_exploratory_for_good(ledger):
    _judge(ledger())
    assert _judge(ledger(), bar=at_least(0.9)).startswith("exploratory: it works (the bar was changed (at least 0.8); by the new one")
    assert _judge(ledger(), bar=at_least(0.9)).startswith("exploratory")
    assert _judge(ledger("laptop", 1)).startswith("exploratory")


@pytest.mark.parametrize("scale, cap", [("smoke", ""), ("overnight", "steps=3")])
def test_rehearsals_never_judge(ledger, monkeypatch, scale, cap, tmp_path):
    if cap:
        monkeypatch.setenv("SAEUTILS_CAP", cap)
    rehearsed = ledger(scale)
    assert _judge(rehearsed, values=[float("nan"), 1.0]) == f"not judged at {scale}: it works"
    assert not len(_kept()) and rehearsed.folder == tmp_path / "cache" / "rehearsal" / "09_x"


def test_a_readers_run_leaves_committed_figures_alone(ledger, monkeypatch, tmp_path):
    _judge(ledger())
    before = (tmp_path / "figures" / "09_x" / "claims.csv").read_bytes()
    monkeypatch.delenv("SAEUTILS_KEEP")
    reader = ledger()
    _judge(reader, values=[0.1, 0.2, 0.3], ceiling=HIGH)
    assert reader.folder == tmp_path / "cache" / "runs" / "09_x" and (reader.folder / "claims.csv").exists()
    assert (tmp_path / "figures" / "09_x" / "claims.csv").read_bytes() == before


def test_what_is_refused(ledger):
    run = ledger()
    _judge(run)
    with pytest.raises(ValueError, match="was judged in this run already"):
        _judge(run)
    with pytest.raises(ValueError, match="one number is judged once"):
        _judge(run, "it works under another name")
    with pytest.raises(ValueError, match="holds the number"):
        _judge(run, "the error falls to 0.05")
    with pytest.raises(ValueError, match="wrong way round"):
        run.judge("c", source="s", paper=0.95, values=LOW, bar=at_most(0.5), control=HIGH)
    with pytest.raises(ValueError, match="make it with at_least"):
        _judge(run, "c", bar=0.9, values=LOW)
    with pytest.raises(ValueError, match="a constant is none"):
        _judge(run, "c", values=LOW, control=0.5)
    for values in (["a", "b", "c"], 0.5):
        with pytest.raises(ValueError, match=r"one (number )?for each unit"):
            _judge(run, "c", values=values)
    for i in range(7):
        _judge(run, f"claim number {i}", values=[0.9 + i, 0.8 + i, 0.85 + i], bar=at_least(0))
    with pytest.raises(ValueError, match="a ninth claim"):
        _judge(run, "one more", values=[7.0, 8.0, 9.0])
    assert len(_kept()) == 8  # what was refused has left no row


@pytest.mark.parametrize("text", ["", "claim,here\nx", "\x00\x01", "a,b\n1,2,3\n4", None])
def test_an_unreadable_ledger_is_told_before_long_work_and_no_other_is_lost(ledger, tmp_path, text):
    _judge(ledger())
    _judge(ledger(notebook="08_y"))
    broken = tmp_path / "figures" / "09_x" / "claims.csv"
    broken.write_text(broken.read_text().replace("yes", "maybe") if text is None else text)
    before = (tmp_path / "figures" / "08_y" / "claims.csv").read_bytes()
    with pytest.raises(ValueError, match="is no ledger any more: bring it back"):
        ledger()
    with pytest.raises(ValueError, match="09_x"):
        claims.all_claims()
    _judge(ledger(run=1, notebook="08_y"))
    assert broken.exists() and (tmp_path / "figures" / "08_y" / "claims.csv").read_bytes().startswith(before)


def test_committed_ledgers_have_the_fixed_columns():
    table = claims.all_claims()
    assert list(table.columns) == [*claims.COLUMNS, "notebook"]
    assert set(table["holds"]) <= set(claims.JUDGEMENTS)
    assert not {"smoke"} & set(table["scale"])
    assert (table.groupby(["notebook", "scale", "run"]).size() <= claims.AT_MOST).all() if len(table) else True


def test_parity_and_sources_numbers(ledger):
    run = ledger()
    assert _judge(run, "as good as", values=[0.01, -0.01, 0.0], bar=between(-0.1, 0.1), control=HIGH).startswith("yes")
    assert run.judge(
        "the source's number", source="table 1", paper=0.91, values=HIGH, bar=between(0.86, 0.96), control=LOW
    ).startswith("yes")
