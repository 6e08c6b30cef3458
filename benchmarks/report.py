"""What a run leaves: a table for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from benchmarks.judging import Finding, Outcome, succeeded

HEADINGS = ("case", "what", "ours", "baseline", "figure", "floor", "aim", "met?")
VERDICTS = {"yes": "yes", "aim": "yes, and the aim", "no": "NO", "not measured": "not measured", "told": ""}


def table(outcomes: Mapping[str, Outcome]) -> str:
    """Markdown, aligned; notes and mismatches below."""
    findings = [finding for outcome in outcomes.values() for finding in outcome.findings]
    rows = [HEADINGS, *map(_row, findings)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    lines += [f"\n{finding.case}, {finding.what}: {finding.note}" for finding in findings if finding.note]
    lines += [f"\nMISMATCH in {case}: {fault}" for case, outcome in outcomes.items() for fault in outcome.mismatches]
    return "\n".join(lines)


def write_json(path: Path, facts: Mapping[str, str], outcomes: Mapping[str, Outcome]) -> None:
    """`facts`; `findings` as in the table; `mismatches` by case; `succeeded`."""
    document: dict[str, Any] = {
        "facts": dict(facts),
        "findings": [
            {**attrs.asdict(finding), "verdict": finding.verdict}
            for outcome in outcomes.values()
            for finding in outcome.findings
        ],
        "rounds": {case: list(outcome.rounds) for case, outcome in outcomes.items()},
        "mismatches": {case: list(outcome.mismatches) for case, outcome in outcomes.items()},
        "succeeded": succeeded(list(outcomes.values())),
    }
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def _row(finding: Finding) -> Sequence[str]:
    bound = finding.bound
    return (
        finding.case,
        finding.what,
        finding.ours,
        finding.baseline,
        "" if finding.figure is None else _shown(finding.figure, finding.unit),
        "" if bound is None else _limit(finding, bound.floor),
        "" if bound is None or bound.aim is None else _limit(finding, bound.aim),
        VERDICTS[finding.verdict],
    )


def _shown(figure: float, unit: str) -> str:
    return f"{figure:,.2f} {unit}" if abs(figure) < 100 else f"{figure:,.0f} {unit}"


def _limit(finding: Finding, limit: float) -> str:
    sign = "≤" if finding.bound is not None and finding.bound.at_most else "≥"
    return f"{sign} {limit:,g} {finding.unit}"
