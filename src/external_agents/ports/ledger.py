"""Limits, budgets and the write-ahead record of invocations."""

from __future__ import annotations

from abc import abstractmethod
from datetime import date, datetime
from functools import cached_property
from typing import Protocol
from uuid import UUID

import attrs

from external_agents.domain.agent import ExternalAgent
from external_agents.domain.budget import BudgetAccount, BudgetConfig
from external_agents.domain.idempotency import fingerprint
from external_agents.domain.invocation import ExternalAgentInvocation
from external_agents.domain.json_values import JsonText
from external_agents.domain.rate_limit import RateQuotas
from external_agents.domain.refusals import RateLimited
from external_agents.ports.rate_limiter import Place


@attrs.frozen(kw_only=True)
class AdmissionRequest:
    """
    What is asked of the ledger.

    Attributes:
        invocation_id: UUIDv7; its millisecond becomes created_at and decides the budget's month.
        agent: As the caller decided on it; one that has changed since is decided on anew.
        idempotency_key: 1 to 255 characters; an invocation that was admitted under it within 24 h is not repeated.
        verdict: Of a `RateLimiter`, where the limits live outside the ledger: it then counts none itself, and raises a
            refusal in its place, after what stands before it.
    """

    invocation_id: UUID
    agent: ExternalAgent
    initiated_by: str
    request: JsonText
    trace_id: str
    lineage_hop_id: str | None = None
    idempotency_key: str | None = None
    verdict: Place | RateLimited | None = None

    @property
    def org_id(self) -> str:
        return self.agent.org_id

    @property
    def agent_id(self) -> UUID:
        return self.agent.id

    @cached_property
    def request_hash(self) -> bytes:
        """The payload's fingerprint. A long payload takes milliseconds: have it before anything is locked."""
        return fingerprint(self.request)


@attrs.frozen(kw_only=True)
class Admission:
    """
    An invocation recorded as running, its place taken, its cost reserved; and what is left of the limits.

    Attributes:
        replayed: It is the one that had been admitted under the same idempotency key, and has ended; nothing was taken,
            nothing is to be sent.
    """

    invocation: ExternalAgentInvocation
    quotas: RateQuotas
    replayed: bool = False


@attrs.frozen(kw_only=True)
class Forecast:
    """
    How an agent's limits stand, without taking anything.

    Attributes:
        at: The store's time; `quotas` count from it.
        month: The first day of the month of `account`, the one in which the store's time lies.
        budget: As the store holds it; None where the agent has no budget_config. `account` is that of its currency.
    """

    at: datetime
    quotas: RateQuotas
    rate_limited: bool
    month: date
    budget: BudgetConfig | None
    account: BudgetAccount
    over_budget: bool


class InvocationLedger(Protocol):
    """
    Rate limits, budgets and the record of invocations, kept together so that none can be true without the others.

    The amounts come from the agent as the store holds it, inside the admission; callers never pass one. Each ledger
    writes for one *instance*, a running process that proves by heartbeats that it lives. What an instance leaves
    running when it is gone, another one's `recover` ends.

    Raises:
        Unavailable: The store cannot be reached; what became of the call is unknown. From every method.
    """

    @abstractmethod
    async def admit(self, request: AdmissionRequest) -> Admission:
        """
        Take a place in all three windows, reserve the cost, record the invocation as running, durably; or do nothing.

        What stands against it is told in the order of the errors below.

        Nothing may be sent to the agent before this returns.

        Raises:
            AgentNotFound: There is none, or it is deleted.
            StaleVersion: The agent has changed since; read it and decide again.
            AgentInactive: The agent is switched off.
            IdempotencyKeyReused: The key belongs to another payload.
            IdempotencyKeyInFlight: The invocation that the key belongs to has not ended.
            RateLimited: A window is full.
            BudgetExceeded: Spent plus reserved would pass the cap.
            AdmissionInDoubt: Do not send; if it was recorded all the same, recovery will end it.
            Unavailable: Do not send; it was not recorded.
        """
        ...

    @abstractmethod
    async def settle(self, finished: ExternalAgentInvocation) -> ExternalAgentInvocation:
        """
        Store how an admitted invocation ended, and turn its reservation into `finished.cost`; once.

        Returns:
            The invocation as it is stored. That is not `finished` where it had been ended before: a second settlement
            changes nothing, and one that comes after recovery's verdict adds its attempts to the record as evidence.
        """
        ...

    @abstractmethod
    async def record(self, finished: ExternalAgentInvocation) -> None:
        """Store a finished call that was made elsewhere. It takes no place and charges nothing."""
        ...

    @abstractmethod
    async def forecast(self, org_id: str, agent_id: UUID) -> Forecast:
        """
        Raises:
            AgentNotFound: The organisation has no such agent.
        """
        ...

    @abstractmethod
    async def heartbeat(self) -> None:
        """Prove that this instance lives: call it every HEARTBEAT_S, and once before the first admission."""
        ...

    @abstractmethod
    def holds_lease(self) -> bool:
        """
        Whether nobody can have taken this instance for dead: ask right before something is sent to an agent.

        Known from its own heartbeats, without a look into the store.
        """
        ...

    @abstractmethod
    async def recover(self) -> int:
        """
        End as `unknown`, charged, what instances left running whose lease has run out; call it every HEARTBEAT_S.

        Returns:
            How many were ended.
        """
        ...


HEARTBEAT_S = 10.0
LEASE_S = 45.0
"""An instance that has not been heard of for this long is taken for dead."""
