"""
Checks of what was admitted when.

That cannot be seen from outside. But the id, which tells its millisecond, was made before the admission; and the
request reached the agent, or its caller was answered, after it. A check complains only when no moment between would do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from uuid import UUID

from chaos.evidence import Evidence, grouped

WINDOWS_S: Mapping[str, float] = {"per_minute": 60.0, "per_hour": 3600.0}


def windows(evidence: Evidence) -> Iterator[str]:
    """
    In no stretch of a window's length were more invocations admitted than the limit.

    One counts for a stretch only when it was certainly admitted within.
    """
    ends = _known_by(evidence)
    for agent_id, rows in grouped(list(evidence.rows.values()), "agent_id").items():
        agent = evidence.agents[agent_id]
        intervals = sorted((row.created_at.timestamp(), ends[row.id]) for row in rows if row.id in ends)
        for name, length_s in WINDOWS_S.items():
            limit = getattr(agent, name)
            if limit is not None and (fault := _overfull(intervals, limit, length_s)):
                yield f"{agent.org}'s {agent.name} ({limit} {name.replace('_', ' a ').removeprefix('per ')}) {fault}"


def _known_by(evidence: Evidence) -> dict[UUID, float]:
    """When it was at the latest admitted."""
    ends: dict[UUID, float] = {}
    for arrival in evidence.arrivals:
        ends[arrival.id] = min(arrival.at, ends.get(arrival.id, arrival.at))
    for answer in evidence.answers:
        if (id := answer.invocation_id) is not None:
            ends[id] = min(answer.ended_at, ends.get(id, answer.ended_at))
    return ends


def _overfull(intervals: Sequence[tuple[float, float]], limit: int, length_s: float) -> str | None:
    """`intervals` by their beginnings; a stretch that holds too many may as well begin where one of them does."""
    worst = max(
        (
            (sum(1 for _, end in intervals[first:] if end < begin + length_s), begin)
            for first, (begin, _) in enumerate(intervals)
        ),
        default=(0, 0.0),
    )
    count, begin = worst
    return f"admitted {count} within {length_s:.0f} s from {begin:.3f}" if count > limit else None


def switched_off(evidence: Evidence) -> Iterator[str]:
    """While an agent was switched off, as its editor had been told, nothing was admitted."""
    ends = _known_by(evidence)
    rows = grouped(list(evidence.rows.values()), "agent_id")
    for agent_id, edits in grouped(list(evidence.edits), "agent_id").items():
        since: float | None = None
        for edit in sorted(edits, key=lambda edit: edit.sent_at):
            if since is not None and "status" in edit.change:
                for row in rows.get(agent_id, ()):
                    if row.created_at.timestamp() > since and ends.get(row.id, float("inf")) < edit.sent_at:
                        yield f"{row.id} was admitted between {since:.3f} and {edit.sent_at:.3f}, while it was off"
            if "status" in edit.change:
                since = edit.ended_at if edit.done and edit.change["status"] == "inactive" else None
