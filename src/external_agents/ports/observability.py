"""Telling others what happened."""

from __future__ import annotations

from abc import abstractmethod
from datetime import datetime
from typing import Protocol, TypeAlias
from uuid import UUID

import attrs

from external_agents.domain.access import Action, Principal
from external_agents.domain.invocation import ExternalAgentInvocation


@attrs.frozen(kw_only=True)
class DecisionRecord:
    """
    An access decision: who, what, on which agent, by which policies, allowed or denied.

    Attributes:
        agent_id: None: on the organisation.
        filters: It left an agent out of a list, or in it; nothing was refused to anybody.
    """

    at: datetime
    principal: Principal
    action: Action
    agent_id: UUID | None
    allowed: bool
    policy_ids: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    filters: bool = False


REPLAYED = "Replayed"


@attrs.frozen(kw_only=True)
class AdmissionRecord:
    """An invocation that was admitted: it is recorded, its cost is reserved, and nothing has been sent yet."""

    at: datetime
    principal: Principal
    invocation: ExternalAgentInvocation


@attrs.frozen(kw_only=True)
class InvocationRecord:
    """
    An invocation as it ended; or, with `refusal`, a request for one that was not admitted.

    An invocation that is answered again under its idempotency key has been told of when it ended, and is not told of as
    ended again: its `refusal` is `REPLAYED`.

    The payload and the answer are within `invocation`; an adapter that writes them anywhere takes on their secrecy.

    Attributes:
        refusal: The name of the error that stood against it (`RateLimited`, `AgentInactive`, `Unavailable`, …), or
            `REPLAYED`.
    """

    at: datetime
    principal: Principal
    agent_id: UUID
    trace_id: str
    invocation: ExternalAgentInvocation | None = None
    refusal: str | None = None


@attrs.frozen(kw_only=True)
class BatchRecord:
    """
    A call of the ledger's store that served several invocations at once.

    Attributes:
        admissions: How many asked to be admitted in it.
        settlements: How many were settled in it.
        waiting: How many were left in the queue when it began.
        duration_s: From its start to its commit.
    """

    admissions: int
    settlements: int
    waiting: int
    duration_s: float


@attrs.frozen(kw_only=True)
class RecoveryRecord:
    """
    What recovery ended as `unknown` for processes that are gone: charged, and told of by no `InvocationRecord`.

    Attributes:
        interrupted: How many invocations.
    """

    at: datetime
    interrupted: int


Record: TypeAlias = DecisionRecord | AdmissionRecord | InvocationRecord | BatchRecord | RecoveryRecord


class ObservabilityManager(Protocol):
    """
    One callable that takes one frozen record per decision, per admission, per invocation that ended or was refused, per
    batch of the ledger's, and per recovery that ended something. Other kinds of record may come with later versions:
    leave alone what you do not know.

    It is called on the event loop, after the fact is durable: it returns at once and queues what takes longer. What it
    raises is logged and changes nothing.
    """

    @abstractmethod
    def __call__(self, record: Record) -> None: ...
