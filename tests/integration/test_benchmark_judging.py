"""What the benchmark makes of its figures."""

from __future__ import annotations

import math
from decimal import Decimal

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.counting import Counted, Expected
from benchmarks.judging import Bound, Finding, Outcome, percentile, succeeded
from benchmarks.profiling import summarised
from benchmarks.report import table

RIGHT = Counted(rows=7, unfinished=0, attempts=7, reserved=Decimal(0), accounts_off=0)
SEEN = Expected(acknowledged=7, agent_requests=7)


def finding(figure: float | None, bound: Bound | None) -> Finding:
    return Finding(case="case", what="what", figure=figure, bound=bound)


@given(st.lists(st.floats(allow_nan=False), min_size=1), st.floats(min_value=0.1, max_value=100))
def test_a_percentile_is_the_smallest_value_that_enough_do_not_exceed(values: list[float], per_cent: float) -> None:
    found = percentile(values, per_cent)
    enough = math.ceil(len(values) * per_cent / 100)
    assert sum(value <= found for value in values) >= enough
    assert sum(value < found for value in values) < enough


def test_percentiles_by_hand() -> None:
    assert [percentile(range(1, 101), per_cent) for per_cent in (1, 50, 99, 100)] == [1, 50, 99, 100]
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 50)


@pytest.mark.parametrize(
    ("figure", "bound", "verdict"),
    [
        (11.99, Bound(floor=12, aim=18), "no"),
        (12.0, Bound(floor=12, aim=18), "yes"),
        (18.0, Bound(floor=12, aim=18), "aim"),
        (3.01, Bound(floor=3, aim=2, at_most=True), "no"),
        (3.0, Bound(floor=3, aim=2, at_most=True), "yes"),
        (2.0, Bound(floor=3, aim=2, at_most=True), "aim"),
        (1.0, Bound(floor=3, at_most=True), "yes"),
        (math.nan, Bound(floor=3, at_most=True), "no"),
        (math.nan, Bound(floor=3), "no"),
        (0.0, None, "told"),
        (None, Bound(floor=3), "not measured"),
    ],
)
def test_verdicts(figure: float | None, bound: Bound | None, verdict: str) -> None:
    assert finding(figure, bound).verdict == verdict


def test_a_missed_floor_or_a_mismatch_fails_the_run_and_what_was_not_measured_does_not() -> None:
    good = Outcome(findings=[finding(1.0, Bound(floor=1)), finding(None, Bound(floor=1)), finding(0.1, None)])
    assert succeeded([good])
    assert not succeeded([good, Outcome(findings=[finding(0.9, Bound(floor=1))])])
    assert not succeeded([good, Outcome(findings=[], mismatches=["one row is missing"])])


def test_counts_that_agree_are_no_mismatch() -> None:
    assert list(RIGHT.mismatches(SEEN)) == []


@pytest.mark.parametrize(
    ("counted", "expected", "told"),
    [
        (attrs.evolve(RIGHT, rows=6), SEEN, "7 invocations were acknowledged, 6 rows"),
        (attrs.evolve(RIGHT, rows=8), SEEN, "8 rows are there"),
        (attrs.evolve(RIGHT, attempts=6), SEEN, "6 attempts"),
        (RIGHT, Expected(acknowledged=7, agent_requests=8), "the agent received 8 requests"),
        (attrs.evolve(RIGHT, unfinished=1), SEEN, "1 invocations are running"),
        (attrs.evolve(RIGHT, reserved=Decimal("0.05")), SEEN, "0.05 is still reserved"),
        (attrs.evolve(RIGHT, accounts_off=2), SEEN, "2 budgets differ"),
    ],
)
def test_every_count_that_is_off_is_told(counted: Counted, expected: Expected, told: str) -> None:
    [mismatch] = counted.mismatches(expected)
    assert told in mismatch


def test_the_table_shows_the_figure_its_bounds_and_whether_they_are_met() -> None:
    measured = Finding(
        case="hot", what="over naive", ours="10/s", baseline="1/s", figure=10.0, bound=Bound(floor=12, aim=18)
    )
    skipped = Finding(case="redis", what="limits", figure=None, bound=Bound(floor=1), note="no server")
    text = table({"hot": Outcome(findings=[measured]), "redis": Outcome(findings=[skipped], mismatches=["off by one"])})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert rows[2] == ["hot", "over naive", "10/s", "1/s", "10.00 x", "≥ 12 x", "≥ 18 x", "NO"]
    assert rows[3][-1] == "not measured"
    assert "redis, limits: no server" in text
    assert "MISMATCH in redis: off by one" in text


def test_a_profile_counts_a_function_once_a_stack() -> None:
    text = summarised("main (a.py:1);work (a.py:5);work (a.py:7) 3\nmain (a.py:2);rest (a.py:9) 1\n 4\n")
    own, total = text.split("total")
    assert " 75.0%  work (a.py)" in own
    assert "100.0%  main (a.py)" in total
    assert " 75.0%  work (a.py)" in total
