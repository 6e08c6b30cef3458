"""
What must hold at the end of a run. Each check is a function of the evidence and names every offender.

None of them raises a false alarm on a slow machine; see `moments`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from typing import Any, TypeAlias
from uuid import UUID

import attrs

from chaos.agent import success
from chaos.evidence import Account, Arrival, Evidence, Row, grouped
from chaos.load import Answer
from chaos.moments import switched_off, windows

ENDED = frozenset({"succeeded", "failed", "unknown"})
REFUSALS = frozenset({402, 409, 429})
EXPECTED = frozenset({None, 200, 402, 409, 429, 502, 503, 504})

Check: TypeAlias = Callable[[Evidence], Iterator[str]]


def acknowledged(evidence: Evidence) -> Iterator[str]:
    """Every invocation that a caller was told of is in the table, with the outcome that he was told."""
    for answer in evidence.answers:
        invocation_id, told = answer.invocation_id, answer.invocation
        if invocation_id is None:
            continue
        row = evidence.rows.get(invocation_id)
        if row is None:
            yield f"{invocation_id} was answered with {answer.status} at {answer.ended_at:.3f} and is not in the table"
        elif told is not None and (differences := list(_differences(told, row))):
            yield f"{invocation_id} was answered with {answer.status}, but {'; '.join(differences)}"


def _differences(told: Mapping[str, Any], row: Row) -> Iterator[str]:
    cost = told["cost"]
    pairs: dict[str, tuple[Any, Any]] = {
        "agent": (told["external_agent_id"], str(row.agent_id)),
        "status": (told["status"], row.status),
        "error_code": (told["error_code"], row.error_code),
        "response_status": (told["response_status"], row.response_status),
        "request": (told["request_payload"], row.request),
        "response": (told["response_payload"], row.response),
        "cost": (None if cost is None else Decimal(cost["amount"]), row.cost),
        "currency": (None if cost is None else cost["currency"], row.currency),
    }
    if row.status != "unknown":
        pairs["attempts"] = _at_moments(told["attempts"]), _at_moments(row.attempts)
    for name, (said, stored) in pairs.items():
        if said != stored:
            yield f"its {name} was told as {said} and is stored as {stored}"


def _at_moments(attempts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A moment can be written in more than one way."""
    return [{**attempt, "at": datetime.fromisoformat(attempt["at"])} for attempt in attempts]


def _lasting(told: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without what may still be added: the attempts of an invocation whose process comes back after the verdict."""
    return told if told["status"] != "unknown" else {name: told[name] for name in told if name != "attempts"}


def finished(evidence: Evidence) -> Iterator[str]:
    """Nothing is running or pending any more."""
    for row in evidence.rows.values():
        if row.status not in ENDED or row.completed_at is None:
            yield f"{row.id} is still {row.status}"


def written_ahead(evidence: Evidence) -> Iterator[str]:
    """Whatever reached the agent had its record when it did, and has it still."""
    for arrival in evidence.arrivals:
        if arrival.row == "absent":
            yield f"{arrival.id} reached the agent at {arrival.at:.3f}, before its record was in the table"
        elif arrival.id not in evidence.rows:
            yield f"{arrival.id} reached the agent at {arrival.at:.3f}, and its record is gone"


def sent_once(evidence: Evidence) -> Iterator[str]:
    """
    Every request that reached the agent was an attempt of the process that had admitted the invocation.

    The record of an invocation that its process ended itself (or saw ended by recovery, and added its attempts) lists
    the attempts: not more requests may have come. One without a list ended with its process, or while that was
    stopped: no request may have come after recovery's verdict from a process that was dead or stopped then. One that
    was stopped and went on may still send what it had begun; that is not recovery.
    """
    for invocation_id, arrivals in evidence.arrivals_by_id.items():
        row = evidence.rows.get(invocation_id)
        if row is None:
            continue  # told by `written_ahead`
        most = evidence.agents[row.agent_id].max_attempts
        if len(arrivals) > most:
            yield f"{invocation_id} reached the agent {len(arrivals)} times; {most} attempts were allowed"
        elif row.attempts and len(arrivals) > len(row.attempts):
            yield f"{invocation_id} reached the agent {len(arrivals)} times in {len(row.attempts)} recorded attempts"
        elif not row.attempts:
            yield from _sent_by_others(evidence, row, arrivals)


def _sent_by_others(evidence: Evidence, row: Row, arrivals: Sequence[Arrival]) -> Iterator[str]:
    worker = evidence.worker_of(row)
    if worker is None or row.completed_at is None:
        return
    verdict_at = row.completed_at.timestamp()
    for arrival in arrivals:
        if arrival.at > verdict_at and not worker.may_act(arrival.at):
            yield (
                f"{row.id} reached the agent at {arrival.at:.3f}, after it had become {row.status} at "
                f"{verdict_at:.3f}, when its process {worker.pid} was dead or stopped"
            )


def not_sent_when_refused(evidence: Evidence) -> Iterator[str]:
    """
    What was refused left no trace, and what was not admitted was not sent.

    A 503 without an invocation's id may leave a record: whether the commit arrived, its worker could not know.
    """
    arrived = {arrival.call for arrival in evidence.arrivals}
    recorded = {row.call for row in evidence.rows.values()}
    for name, answers in _by_call(evidence).items():
        statuses = {answer.status for answer in answers}
        if not statuses <= REFUSALS | {503} or any(answer.invocation_id for answer in answers):
            continue
        if name in arrived:
            yield f"call {name} was answered with {_words(statuses)} and reached the agent"
        if name in recorded and 503 not in statuses:
            yield f"call {name} was answered with {_words(statuses)} and is in the table"


def one_a_call(evidence: Evidence) -> Iterator[str]:
    """One call, however often it was repeated under its key, is one invocation at most, and repeats tell the same."""
    rows = grouped(list(evidence.rows.values()), "call")
    for name, answers in _by_call(evidence).items():
        ids = {row.id for row in rows.get(name, ())}
        if len(ids) > 1:
            yield f"call {name} became {len(ids)} invocations: {_words(ids)}"
        told = [answer.invocation for answer in answers if answer.invocation is not None]
        if any(_lasting(document) != _lasting(told[0]) for document in told):
            yield f"call {name} was answered in different ways under one key: {told}"


def books(evidence: Evidence) -> Iterator[str]:
    """Every account is the sum over its rows, to the last digit; nothing is reserved; no cap was passed."""
    sums: dict[tuple[str, UUID, str | None, date], Decimal] = {}
    for row in evidence.rows.values():
        if row.cost is not None:
            key = (row.org_id, row.agent_id, row.currency, row.created_at.date().replace(day=1))
            sums[key] = sums.get(key, Decimal(0)) + row.cost
    for account in evidence.accounts:
        key = (account.org_id, account.agent_id, account.currency, account.month)
        yield from _faults_of(account, sums.pop(key, Decimal(0)), evidence)
    for (org_id, agent_id, currency, month), total in sums.items():
        # An agent without a budget has no account, and may tell a cost all the same.
        if evidence.agents[agent_id].cap is not None:
            yield f"{total} {currency} of {org_id}'s {agent_id} in {month} are in no account"


def _faults_of(account: Account, total: Decimal, evidence: Evidence) -> Iterator[str]:
    agent = evidence.agents[account.agent_id]
    name = f"{account.org_id}'s {agent.name} ({account.month}, {account.currency})"
    if account.spent != total:
        yield f"{name} has spent {account.spent} by its account and {total} by its rows"
    if account.reserved != 0:
        yield f"{name} still has {account.reserved} reserved"
    if agent.cap is not None and account.spent > agent.cap:
        yield f"{name} has spent {account.spent} of {agent.cap}"


def charges(evidence: Evidence) -> Iterator[str]:
    """Every row costs what it must: the agent's figure, the reservation, or nothing."""
    for row in evidence.rows.values():
        agent = evidence.agents[row.agent_id]
        if row.reservation != agent.reservation:
            yield f"{row.id} reserved {row.reservation} instead of {agent.reservation}"
        if row.cost not in (allowed := _costs(row)):
            yield f"{row.id} ({row.status}, {row.request['do']}) cost {row.cost} instead of {_words(allowed)}"
        if row.status == "succeeded" and row.request["do"] != "text" and row.response != success(dict(row.request)):
            yield f"{row.id} succeeded with {row.response}, which the agent did not answer"


def _costs(row: Row) -> set[Decimal | None]:
    told = row.request["cost"]
    match row.status:
        case "succeeded":
            return {row.reservation if told is None or row.request["do"] == "text" else Decimal(told)}
        case "unknown":
            return {row.reservation}
        case _ if all("status" in attempt for attempt in row.attempts):
            return {None}  # Every attempt was answered completely, and none with success.
        case _:
            return {None, row.reservation}


def expected_answers(evidence: Evidence) -> Iterator[str]:
    """Nothing was answered that the contract does not know, our own fault least of all."""
    for answer in evidence.answers:
        if answer.status not in EXPECTED:
            yield f"call {answer.call.name} was answered with {answer.status}: {answer.document}"


def alive(evidence: Evidence) -> Iterator[str]:
    """No worker died that was not killed."""
    for worker in evidence.workers.values():
        if worker.died_at != float("inf") and not worker.killed:
            yield f"worker {worker.pid} of server {worker.server} died by itself at {worker.died_at:.3f}"


@attrs.frozen
class Named:
    """A check and, where the claim line has one, the number of it that it counts towards."""

    name: str
    check: Check
    claim: str | None = None

    @property
    def promise(self) -> str:
        return (self.check.__doc__ or "").strip().splitlines()[0]


CHECKS = (
    Named("acknowledged", acknowledged, "lost"),
    Named("finished", finished, "lost"),
    Named("written ahead", written_ahead, "lost"),
    Named("sent twice", sent_once, "sent twice by recovery"),
    Named("books", books, "overspent"),
    Named("charges", charges, "overspent"),
    Named("windows", windows, "over-admitted"),
    Named("refused", not_sent_when_refused),
    Named("one a call", one_a_call),
    Named("switched off", switched_off),
    Named("answers", expected_answers),
    Named("alive", alive),
)
CLAIMS = ("lost", "sent twice by recovery", "overspent", "over-admitted")


def covered(evidence: Evidence, events: Mapping[str, int]) -> Iterator[str]:
    """The run was worth something: every kind of answer came, and what crashes leave behind was there."""
    statuses = Counter(answer.status for answer in evidence.answers)
    for status in (200, 402, 409, 429, 502, 504, *((503,) if events.get("database") else ())):
        if not statuses[status]:
            yield f"nothing was answered with {status}"
    if events.get("kill") and not any(row.status == "unknown" for row in evidence.rows.values()):
        yield "nothing was interrupted"
    if not any(answer.replayed for answer in evidence.answers):
        yield "nothing was replayed"


def _by_call(evidence: Evidence) -> Mapping[str, Sequence[Answer]]:
    calls: dict[str, list[Answer]] = {}
    for answer in evidence.answers:
        calls.setdefault(answer.call.name, []).append(answer)
    return calls


def _words(items: Any) -> str:
    return " or ".join(sorted(map(str, items)))
