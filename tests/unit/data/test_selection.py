"""Rules over scores: what they keep, and exact words for what is wrong with one."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidit.data.selection import Score, parse_rule, rule_faults, select

SCORES: dict[str, list[Score]] = {
    "motion": [0.0, 0.5, 1.0, 2.0, 4.0],
    "brightness": [10.0, 20.0, 120.0, 235.0, 240.0],
    "cuts": [0, 0, 1, 0, 2],
    "duplicate_of": [None, "a", None, None, "c"],
}


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ("motion>=0.5", "01111"), ("motion > .5", "00111"), ("motion <= 1e0", "11100"), ("motion < 1", "11000"),
        ("cuts == 0", "11010"), ("cuts!=0", "00101"), ("brightness in 20..235", "01110"),
        (" brightness  in  20 .. 235.0 ", "01110"), ("duplicate_of is none", "10110"),
        ("duplicate_of is not none", "01001"), ("motion >= q0.5", "00111"), ("motion < q0.25", "10000"),
        ("motion in q.25..q0.75", "01110"), ("motion in 0.7..q1", "00111"), ("motion >= -1", "11111"),
    ],
)  # fmt: skip
def test_rules(rule: str, kept: str) -> None:
    selection = select(SCORES, [rule])
    assert selection.keep == tuple(mark == "1" for mark in kept)
    assert selection.verdicts[0].num_dropped == kept.count("0")


def test_counts_do_not_depend_on_the_order_of_the_rules() -> None:
    rules = ["motion >= 0.5", "cuts == 0", "brightness in 20..235"]
    selection = select(SCORES, rules)
    assert selection.keep == (False, True, False, True, False)
    counts = {v.rule.text: (v.num_dropped, v.only) for v in selection.verdicts}
    assert counts == {"motion >= 0.5": (1, 0), "cuts == 0": (2, 1), "brightness in 20..235": (2, 0)}
    assert {v.rule.text: (v.num_dropped, v.only) for v in select(SCORES, rules[::-1]).verdicts} == counts
    assert selection.reason(0) == "not motion >= 0.5; not brightness in 20..235"
    assert selection.reason(1) == ""


def test_what_a_rule_does_is_said() -> None:
    first, second = select(SCORES, ["motion >= q0.25", "motion >= 0"]).verdicts
    assert first.line() == "select motion >= q0.25 (that is 0.5): drops 1 of 5 clips, 1 of them alone"
    assert second.line() == "select motion >= 0: drops no clip"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("moton >= 1", "rule 'moton >= 1': no score 'moton'; nearest: motion"),
        ("xyz >= 1", "rule 'xyz >= 1': no score 'xyz'; there are brightness, cuts, duplicate_of, motion"),
        ("motion > 4", "rule 'motion > 4' drops all 5 clips; motion lies between 0 and 4"),
        ("motion is none", "rule 'motion is none' drops all 5 clips; motion lies between 0 and 4"),
        ("duplicate_of == 0", "rule 'duplicate_of == 0': duplicate_of is no number; write `duplicate_of is none`"),
    ],
)
def test_rules_that_do_not_fit_the_scores(rule: str, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole text is compared
        select(SCORES, [rule])
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("motion", "is not understood; write `score >= 0.5`"),
        ("motion >= fast", "is not understood"),
        ("motion >= 1 and cuts == 0", "is not understood"),
        ("__import__('os')", "is not understood"),
        ("motion = 1", "is not understood"),
        ("motion >= q1.5", "q1.5 is no quantile; use q0 to q1"),
        ("motion in 5..1", "5 is above 1; write the lower end first"),
        ("motion in ..5", "a range has two ends; write `motion <= 5`"),
        ("motion in 5", "is not understood"),
        ("", "is not understood"),
    ],
)
def test_what_is_no_rule(rule: str, message: str) -> None:
    (fault,) = rule_faults(["cuts == 0", rule])
    assert fault.startswith(f"rule {rule!r}")
    assert message in fault


def test_rules_that_leave_nothing_together_are_refused_with_their_counts() -> None:
    with pytest.raises(ValueError, match=r"together drop all 5 clips.*drops 3 of 5.*drops 3 of 5"):
        select(SCORES, ["motion >= 2", "motion <= 0.5", "motion >= 0"])


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 1))
def test_quantiles_are_those_of_numpy(values: list[float], share: float) -> None:
    (verdict,) = select({"x": values}, [f"x <= q{share:f}", "x >= q0"]).verdicts[:1]
    expected = float(np.quantile(values, float(f"{share:f}")))
    assert verdict.limits[0] == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_no_rules_keep_all() -> None:
    assert select(SCORES, []).keep == (True,) * 5


def test_parsing_needs_no_torch_and_no_numpy() -> None:
    code = "import sys; import vidit.data.selection; print({'torch', 'numpy', 'cv2'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_a_rule_keeps_its_text() -> None:
    rule = parse_rule(" motion>=0.5 ")
    assert (rule.text, rule.name, rule.kind) == ("motion>=0.5", "motion", ">=")
