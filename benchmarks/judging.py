"""What figures come out of the rounds, and whether they are good enough."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import attrs

PER_CENT = 100


def percentile(values: Sequence[float], per_cent: float) -> float:
    """
    The smallest of the values that at least so many per cent of them do not exceed (nearest rank).

    Raises:
        ValueError: There are none.
    """
    if not values:
        raise ValueError("a percentile of nothing")
    rank = max(1, math.ceil(len(values) * per_cent / PER_CENT))
    return sorted(values)[rank - 1]


@attrs.frozen(kw_only=True)
class Bound:
    """What a figure must reach (`floor`) and should reach (`aim`); with `at_most` neither may be exceeded."""

    floor: float
    aim: float | None = None
    at_most: bool = False

    def met_by(self, figure: float) -> bool:
        return self._reached(figure, self.floor)

    def aim_met_by(self, figure: float) -> bool | None:
        return None if self.aim is None else self._reached(figure, self.aim)

    def _reached(self, figure: float, wanted: float) -> bool:
        return figure <= wanted if self.at_most else figure >= wanted


Verdict = Literal["yes", "aim", "no", "not measured", "told"]


@attrs.frozen(kw_only=True)
class Finding:
    """
    One line of the table.

    Attributes:
        ours, baseline: What was measured, as shown; empty where there is none.
        figure: What is judged, in `unit`; None: not measured, and `note` says why.
        bound: None: told for comparison, and not judged.
    """

    case: str
    what: str
    ours: str = ""
    baseline: str = ""
    figure: float | None
    unit: str = "x"
    bound: Bound | None = None
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        if self.figure is None:
            return "not measured"
        if self.bound is None:
            return "told"
        if not self.bound.met_by(self.figure):
            return "no"
        return "aim" if self.bound.aim_met_by(self.figure) else "yes"


@attrs.frozen(kw_only=True)
class Outcome:
    """What a case gave: its lines, what did not add up when it was counted, and the rounds behind it."""

    findings: Sequence[Finding]
    mismatches: Sequence[str] = ()
    rounds: Sequence[Mapping[str, object]] = ()


def succeeded(outcomes: Sequence[Outcome]) -> bool:
    """Whether no floor was missed and every count was right. What was not measured does not fail a run."""
    return not any(outcome.mismatches for outcome in outcomes) and not any(
        finding.verdict == "no" for outcome in outcomes for finding in outcome.findings
    )
