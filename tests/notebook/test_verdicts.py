"""The rule by which claims are judged, as properties: what can never be a yes, what is refused, what an interval covers."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saeutils.notebook.verdicts import at_least, at_most, between, joined, verdict, without_numbers

number = st.floats(-100, 100, allow_nan=False).map(lambda x: round(x, 3))
slack = st.floats(0, 50, allow_nan=False)
units = st.lists(number, min_size=3, max_size=9, unique=True)


def _low_high(x):
    from saeutils.metrics import interval

    return interval(x)[1:]


@st.composite
def same_length(draw, n=2):
    size = draw(st.integers(3, 9))
    return [draw(st.lists(number, min_size=size, max_size=size, unique=True)) for _ in range(n)]


bars = st.one_of(
    number.map(at_least), number.map(at_most), st.tuples(number, number).filter(lambda b: b[0] < b[1]).map(lambda b: between(*b))
)


@settings(max_examples=400, deadline=None)
@given(same_length(), st.sampled_from([at_least, at_most, between]), slack, slack)
def test_a_control_that_passes_never_gives_yes(drawn, kind, below, above):
    values, control = drawn
    low, high = _low_high(control)
    ends = {at_least: [low - below], at_most: [high + above], between: [low - below, high + above]}
    assert verdict(values, kind(*ends[kind]), control).holds != "yes"


@settings(max_examples=400, deadline=None)
@given(same_length(), number, st.booleans())
def test_what_is_no_better_than_its_control_is_never_yes(drawn, level, up):
    values, control = sorted(drawn, key=np.mean, reverse=not up)
    assert verdict(values, at_least(level) if up else at_most(level), control).holds != "yes"


@settings(max_examples=400, deadline=None)
@given(same_length(3), bars)
def test_a_verdict_follows_from_the_intervals(drawn, bar):
    values, control, ceiling = drawn
    found, bare = verdict(values, bar, control, ceiling), verdict(values, bar, control)
    inside = bar.low <= found.here.low and found.here.high <= bar.high
    beyond = found.here.low > bar.high or found.here.high < bar.low
    assert found.holds in ("yes", "no", "cannot tell") and found.why
    assert found.holds != "yes" or inside
    assert found.holds != "no" or beyond
    assert bare.holds != "no" or bar.at_zero  # without a ceiling
    passes = bar.low <= found.ceiling.low and found.ceiling.high <= bar.high
    assert not (beyond and passes) or found.holds == "no"
    assert found.holds == bare.holds or not bar.at_zero


@pytest.mark.parametrize("n", [1, 2])
def test_fewer_than_three_units_cannot_tell(n):
    found = verdict([9.0, 9.1][:n], at_least(1), [0.1, 0.2][:n])
    assert found.holds == "cannot tell" and "3 are needed" in found.why


def test_yes_no_and_the_reasons():
    high, low = [0.91, 0.93, 0.92, 0.94], [0.1, 0.2, 0.12, 0.15]
    assert verdict(high, at_least(0.8), low).holds == "yes"
    assert verdict(low, at_most(0.5), high).holds == "yes"
    assert verdict(low, at_least(0.8), [0.0, 0.1, 0.05, 0.02]).why.endswith("no ceiling")
    assert verdict(low, at_least(0.8), [0.0, 0.1, 0.05, 0.02], low).why.endswith("nor does the ceiling")
    assert verdict(low, at_least(0.8), [0.0, 0.1, 0.05, 0.02], high)[:2] == ("no", "the whole interval is below the bar")
    assert verdict([-0.3, -0.2, -0.25], at_least(0), [-1, -1.1, -1.2]).holds == "no"  # a sign needs no ceiling
    assert "crosses" in verdict([0.1, 0.9, 0.5], at_least(0.5), low[:3]).why
    assert verdict(high, at_least(0.8), [0.95, 0.97, 0.96, 0.94]).why == "the control passes too"
    assert verdict(high, at_least(0.8), [0.5, 1.3, 0.2, 1.4]).why == "no better than the control"


def test_parity_says_in_which_direction():
    parity, far = between(-0.05, 0.05), [0.4, 0.5, 0.45]
    assert verdict([0.01, -0.01, 0.0], parity, far).holds == "yes"
    assert verdict([0.01, -0.01, 0.0], parity, [0.0, 0.2, 0.1]).why == "the control may be inside the bar too"
    assert verdict([-0.22, -0.23, -0.21], parity, far)[:2] == ("no", "the whole interval is below the bar")


def test_units_are_paired_by_name_or_place():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 10, 8)
    values, control = base + 1 + rng.normal(0, 0.1, 8) + 100, base + 100
    assert verdict(values, at_least(50), control).holds == "cannot tell"  # both pass
    paired = verdict(values - 100, at_least(-50), control - 200)
    assert paired.holds == "yes"
    names = list("abcdefgh")
    a, b = pd.Series(values, names), pd.Series(control - 300, names).sample(frac=1, random_state=0)
    assert verdict(a, at_least(50), b).holds == "yes"
    others = pd.Series((control - 300), [n + "'" for n in names])
    assert verdict(a, at_least(50), others).holds == "yes"  # Welch
    with pytest.raises(ValueError, match="share 4 of 8 units"):
        verdict(a, at_least(50), pd.Series(control, names[4:] + list("wxyz")))


def test_shares_of_few_items_are_no_proof():
    assert verdict([1.0, 1.0, 1.0], at_least(0.9), [0.0, 0.0, 0.0], items=300).holds == "yes"
    assert verdict([1.0, 1.0, 1.0], at_least(0.9), [0.0, 0.0, 0.0], items=12).holds == "cannot tell"
    assert "its units all have the same number" in verdict([1.0, 1.0, 1.0], at_least(0.9), [0.0, 0.0, 0.0]).why


def test_seeds_and_items_together():
    rng = np.random.default_rng(0)
    values = 0.8 + rng.normal(0, 0.05, (3, 1)) + rng.normal(0, 0.1, (1, 200)) + rng.normal(0, 0.1, (3, 200))
    found = verdict(values, at_least(0.3), values - 0.6 + rng.normal(0, 0.05, values.shape))
    assert found.holds == "yes" and found.units == 3


def test_other_statistics_need_twenty_units():
    rng = np.random.default_rng(0)
    few = verdict(rng.normal(9, 1, 10), at_least(1), rng.normal(0, 1, 10), statistic="median")
    assert few.holds == "cannot tell" and "a bootstrap needs 20" in few.why
    assert verdict(rng.normal(9, 1, 25), at_least(1), rng.normal(0, 1, 25), statistic="median").holds == "yes"


GOOD = [0.1, 0.2, 0.3]


@pytest.mark.parametrize("values, control, message", [
    ([0.1, np.nan, 0.3], GOOD, "values has NaN or infinite"),
    (GOOD, [0.1, np.inf, 0.2], "control has NaN or infinite"),
    ([], [], "values is empty"),
    (GOOD, [0.1, 0.2], r"values are \(3,\), the control \(2,\)"),
    (GOOD, [[0.1, 0.2]] * 3, "of its own kind"),
    (GOOD, 0.2, "a constant is none"),
    (0.2, GOOD, "give one number for each unit"),
    (GOOD, ["a", "b", "c"], "control is no list of numbers"),
    (GOOD, {"a": 1}, "a constant is none"),
    (GOOD, None, "a constant is none"),
])  # fmt: skip
def test_refused(values, control, message):
    with pytest.raises(ValueError, match=message):
        verdict(values, at_least(0), control)


def test_bars_are_checked():
    for low, high in ((0.3, -0.3), (1, 1), (np.nan, 1), (-np.inf, np.inf)):
        with pytest.raises(ValueError, match="wrong way round or empty"):
            between(low, high)
    with pytest.raises(ValueError, match=r"make it with at_least\(b\)"):
        verdict(GOOD, 0.9, GOOD)
    assert [str(b) for b in (at_least(0.9), at_most(2), between(-1, 1))] == ["at least 0.9", "at most 2", "between -1 and 1"]


@pytest.mark.parametrize("claim", ["the error falls to 0.051", "a share above .9", "dead by 12 %", "dead by 12%", "3.5 × better"])
def test_a_claim_holds_no_measured_number(claim):
    with pytest.raises(ValueError, match="holds the number"):
        without_numbers(claim)


def test_a_claim_may_name_settings():
    assert without_numbers("Steering with α = 10 at block 12 (k = 32, 16 ×) lowers it")
    with pytest.raises(ValueError, match="empty"):
        without_numbers("  ")


def test_runs_that_contradict_cannot_tell():
    assert joined([("yes", "a"), ("no", "b")])[0] == "cannot tell"
    assert joined([("yes", "a"), ("cannot tell", "b")]) == ("cannot tell", "the two runs disagree: yes, cannot tell")
    assert joined([("yes", "a")]) == ("cannot tell", "one run only")
    assert joined([("no", "a"), ("no", "b")]) == ("no", "a")
