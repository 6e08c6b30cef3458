"""The use cases: registering agents, invoking them, reading the record."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from functools import partial
from typing import TypeAlias
from uuid import UUID

import attrs

from external_agents.application.access import AccessControl, Witness
from external_agents.application.invocation import Assignment, InvocationPipeline, Invoked, TaskKeeper
from external_agents.application.invocation_request import InvocationRequest
from external_agents.application.known_agents import KNOWN_MAX, KnownAgent, KnownAgents
from external_agents.application.parameters import (
    LIMIT_MAX,
    PAGE_MAX,
    AgentPage,
    InvocationPage,
    ParameterReader,
    cursor_of,
)
from external_agents.application.records import finished_call
from external_agents.application.registration import Registrar
from external_agents.application.usage import Usage, usage_of
from external_agents.application.visible_agents import VisibleAgents, id_of
from external_agents.domain.access import Action, Principal
from external_agents.domain.agent import AgentStatus, ExternalAgent
from external_agents.domain.catalog import BUILT_IN, Catalog
from external_agents.domain.egress import UrlRules
from external_agents.domain.errors import AgentInactive, AgentNotFound, StaleVersion, Unavailable
from external_agents.domain.invocation import ExternalAgentInvocation, InvocationStatus
from external_agents.domain.json_values import JsonText, JsonValue
from external_agents.ports.identity import Authenticator
from external_agents.ports.ledger import InvocationLedger
from external_agents.ports.observability import ObservabilityManager
from external_agents.ports.policy import PolicyDecisionPoint
from external_agents.ports.repositories import (
    AgentQuery,
    AgentReader,
    AgentWriter,
    InvocationQuery,
    InvocationReader,
)
from external_agents.ports.secrets import SecretBox
from external_agents.ports.system import Clock, IdSource
from external_agents.ports.transport import AgentTransport

DRAIN_S = 135.0
"""Longer than any invocation may take, so that draining loses none."""

_RACES_MAX = 10

AgentId: TypeAlias = UUID | str
Versions: TypeAlias = Collection[int]


class ExternalAgentService:
    """
    What an organisation does with agents that live elsewhere.

    Every method takes the principal first and stays within its organisation; another organisation's agent does not
    exist. What is checked comes in this order: existence, permission, version, input, state, idempotency, limits.

    The constructor takes ports, by keyword; the authenticator is for those who serve it, and hosts that know their
    principals need none. The service does not own them: whoever opened them closes them, after
    `drain`. It remembers at most `known_agents_max` agents that were invoked before, and what they are to receive.

    Raises:
        PermissionDenied: The policies do not allow it. From every method.
        Unavailable: Something that the service stands on is down. From every method.
    """

    def __init__(
        self,
        *,
        agent_reader: AgentReader,
        agent_writer: AgentWriter,
        invocation_reader: InvocationReader,
        ledger: InvocationLedger,
        policy: PolicyDecisionPoint,
        transport: AgentTransport,
        secret_box: SecretBox,
        observability: ObservabilityManager,
        url_rules: UrlRules,
        clock: Clock,
        ids: IdSource,
        authenticator: Authenticator | None = None,
        catalog: Catalog = BUILT_IN,
        known_agents_max: int = KNOWN_MAX,
    ) -> None:
        self.authenticator = authenticator
        self.catalog = catalog
        self._writer = agent_writer
        self._invocations = invocation_reader
        self._ledger = ledger
        self._clock = clock
        self._ids = ids
        self._witness = Witness(observability)
        self._access = AccessControl(policy, clock, self._witness)
        self._agents = VisibleAgents(agent_reader, self._access)
        self._registrar = Registrar(catalog, url_rules, secret_box)
        self._known = KnownAgents(
            agent_reader, self._access, self._registrar.opened, clock=clock, known_max=known_agents_max
        )
        self._tasks = TaskKeeper()
        self._pipeline = InvocationPipeline(
            ledger=ledger, transport=transport, clock=clock, ids=ids, witness=self._witness, tasks=self._tasks
        )

    async def drain(self, timeout_s: float = DRAIN_S) -> int:
        """Wait for the running invocations to end, at most `timeout_s`. Returns how many were left running."""
        return await self._tasks.drain(timeout_s)

    def validate_auth_config(self, auth_type: str, config: JsonValue) -> None:
        """
        Judge an auth_config with its secrets, as `create_agent` would.

        Args:
            auth_type: `oauth2`, `api_key`, `bearer`, `basic`, `custom`, `none`, or one that was added.

        Raises:
            ValidationError: `errors` names every fault; paths are relative to the config (`client_id`).
        """
        self._registrar.check_auth_config(auth_type, config)

    def validate_platform_config(self, provider: str, config: JsonValue) -> None:
        """
        Judge a platform_config with its secrets, as `create_agent` would.

        Args:
            provider: `teams`, `discord`, `slack`, `telegram`, `notion`, `custom`, or one that was added.

        Raises:
            ValidationError: `errors` names every fault; paths are relative to the config (`tenant_id`).
        """
        self._registrar.check_platform_config(provider, config)

    async def create_agent(self, principal: Principal, document: JsonValue) -> ExternalAgent:
        """
        Register an agent.

        Args:
            document: The fields of the API's create body.

        Raises:
            ValidationError: `errors` names every fault of the document.
        """
        await self._access.require(principal, Action.CREATE)
        agent = self._registrar.register(
            document,
            agent_id=self._ids.new_id(),
            org_id=principal.org_id,
            by=principal.subject,
            at=self._clock.now(),
        )
        await self._writer.create(agent)
        return agent

    async def get_agent(self, principal: Principal, agent_id: AgentId) -> ExternalAgent:
        """
        Raises:
            AgentNotFound: There is none, or it is deleted.
        """
        return await self._agents.one(principal, Action.READ, agent_id)

    async def list_agents(
        self,
        principal: Principal,
        *,
        page: int | str = 1,
        limit: int | str = 20,
        status: str | None = None,
        provider: str | None = None,
        tag: str | None = None,
        q: str | None = None,
        **unknown: object,
    ) -> AgentPage:
        """
        A page of the organisation's agents, newest first; deleted ones only with `status="deleted"`.

        Args:
            page: From 1.
            limit: 1 to 100.
            q: A part of the name or the description, whatever the case.

        Raises:
            ValidationError: A parameter is unknown or out of range.
        """
        await self._access.require(principal, Action.READ)
        read = ParameterReader(unknown)
        number, size = read.whole("page", page, maximum=PAGE_MAX), read.whole("limit", limit, maximum=LIMIT_MAX)
        query = AgentQuery(
            org_id=principal.org_id,
            status=read.choice("status", status, AgentStatus),
            provider=read.member("provider", provider, list(self.catalog.platforms)),
            tag=read.text("tag", tag),
        )
        text = read.text("q", q)
        read.finish()
        items, total = await self._agents.page(principal, query, text, offset=(number - 1) * size, limit=size)
        return AgentPage(items=items, page=number, limit=size, total=total)

    async def update_agent(
        self, principal: Principal, agent_id: AgentId, patch: JsonValue, *, if_version: Versions | None = None
    ) -> ExternalAgent:
        """
        Change an agent by a JSON merge patch (RFC 7396).

        Args:
            if_version: Change it only while its version is one of these.

        Raises:
            AgentNotFound: There is none, or it is deleted.
            StaleVersion: Its version is none of `if_version`.
            ValidationError: Every fault of the patch and of the merged whole.
        """
        for _ in range(_RACES_MAX):
            agent = await self._agents.one(principal, Action.UPDATE, agent_id)
            _require_version(agent, if_version)
            amended = self._registrar.amend(agent, patch, by=principal.subject, at=self._clock.now())
            try:
                await self._writer.update(amended)
            except StaleVersion:
                continue
            self._known.forget(amended)
            return amended
        raise Unavailable("The agent, changed by others all the time,", retry_after_s=1)

    async def delete_agent(
        self, principal: Principal, agent_id: AgentId, *, if_version: Versions | None = None
    ) -> None:
        """
        Mark an agent as deleted; its record and its invocations stay, its secrets go.

        Raises:
            AgentNotFound: There is none, or it is deleted already.
            StaleVersion: Its version is none of `if_version`.
        """
        for _ in range(_RACES_MAX):
            agent = await self._agents.one(principal, Action.DELETE, agent_id)
            _require_version(agent, if_version)
            deleted = agent.deleted(by=principal.subject, at=self._clock.now())
            try:
                await self._writer.delete(deleted)
            except StaleVersion:
                continue
            self._known.forget(deleted)
            return
        raise Unavailable("The agent, changed by others all the time,", retry_after_s=1)

    async def invoke_agent(
        self,
        principal: Principal,
        agent_id: AgentId,
        payload: JsonValue | JsonText,
        *,
        trace_id: str | None = None,
        lineage_hop_id: str | None = None,
        idempotency_key: str | None = None,
    ) -> ExternalAgentInvocation:
        """
        Call an agent under its limits and keep the record.

        The payload is POSTed to webhook_url with the agent's credentials, tried up to max_attempts times, each at most
        timeout_s. Whoever cancels this call does not cancel the invocation.

        Args:
            payload: Any JSON value; a `JsonText` is forwarded byte for byte.
            trace_id: 32 hex digits of the trace this belongs to; a new one by default.
            lineage_hop_id: At most 200 characters.
            idempotency_key: 1 to 255 characters. For 24 h from its admission, an invocation of this agent with this key
                and equal JSON is not made again: the first one is returned as it ended, well or not. A refusal keeps
                no key.

        Returns:
            The invocation as it ended; look at its status: an agent that failed is no error of this call.

        Raises:
            AgentNotFound: There is none, or it is deleted.
            ValidationError: The payload is no JSON value, or the hop id or the key is none.
            AgentInactive: It is switched off.
            IdempotencyKeyReused: The key came with another payload before.
            IdempotencyKeyInFlight: The invocation with this key has not ended.
            RateLimited: A window is full; nothing was recorded or sent.
            BudgetExceeded: The monthly cap is reached; nothing was recorded or sent.
            Unavailable: With `invocation_id`: it has ended, but that could not be stored yet. Look it up.
        """
        invoked = await self.invoke(
            principal,
            agent_id,
            payload,
            trace_id=trace_id,
            lineage_hop_id=lineage_hop_id,
            idempotency_key=idempotency_key,
        )
        return invoked.invocation

    async def invoke(
        self,
        principal: Principal,
        agent_id: AgentId,
        payload: JsonValue | JsonText,
        *,
        trace_id: str | None = None,
        lineage_hop_id: str | None = None,
        idempotency_key: str | None = None,
    ) -> Invoked:
        """`invoke_agent`, with what is left of the limits, and whether it is an earlier invocation's answer again."""
        asked = InvocationRequest(
            payload=payload,
            trace_id=trace_id or self._ids.new_trace_id(),
            lineage_hop_id=lineage_hop_id,
            idempotency_key=idempotency_key,
        )
        prepare = partial(self._assignment, principal, asked)
        for _ in range(_RACES_MAX):
            try:
                assignment = await self._known.to_invoke(principal, agent_id, prepare)
            except AgentInactive as refusal:
                self._pipeline.tell_refusal(principal, id_of(agent_id), asked.trace_id, type(refusal).__name__)
                raise
            try:
                return await self._pipeline.carry_out(assignment)
            except StaleVersion:
                self._known.forget(assignment.agent)
            except AgentNotFound:
                self._known.forget(assignment.agent)
                raise
        self._pipeline.tell_refusal(principal, assignment.agent.id, asked.trace_id, Unavailable.__name__)
        raise Unavailable("The agent, changed by others all the time,", retry_after_s=1)

    async def check_rate_limit(self, principal: Principal, agent_id: AgentId) -> bool:
        """
        Whether the rate limits would admit an invocation now. Takes no place.

        Raises:
            AgentNotFound: There is none, or it is deleted.
        """
        agent = await self._agents.one(principal, Action.INVOKE, agent_id)
        return not (await self._ledger.forecast(principal.org_id, agent.id)).rate_limited

    async def check_budget(self, principal: Principal, agent_id: AgentId) -> bool:
        """
        Whether the budget would cover an invocation now. Reserves nothing.

        Raises:
            AgentNotFound: There is none, or it is deleted.
        """
        agent = await self._agents.one(principal, Action.INVOKE, agent_id)
        return not (await self._ledger.forecast(principal.org_id, agent.id)).over_budget

    async def get_usage(self, principal: Principal, agent_id: AgentId) -> Usage:
        """
        How the agent's rate limits and its budget stand. Takes and reserves nothing.

        Raises:
            AgentNotFound: There is none, or it is deleted.
        """
        agent = await self._agents.one(principal, Action.READ, agent_id)
        return usage_of(await self._ledger.forecast(principal.org_id, agent.id))

    async def log_invocation(
        self, principal: Principal, agent_id: AgentId, record: JsonValue
    ) -> ExternalAgentInvocation:
        """
        Store a finished call that the host made itself. It takes no place in the limits and is charged nothing.

        Args:
            record: `status` (`succeeded`, `failed` or `unknown`) and `request_payload`; optionally `response_payload`,
                `response_status`, `execution_time_ms`, `error_code`, `error_message`, `lineage_hop_id`, `trace_id`.

        Raises:
            AgentNotFound: There is none, or it is deleted.
            ValidationError: Every fault of the record.
        """
        agent = await self._agents.one(principal, Action.INVOKE, agent_id)
        invocation = finished_call(
            record,
            agent=agent,
            initiated_by=principal.subject,
            invocation_id=self._ids.new_id(),
            trace_id=self._ids.new_trace_id(),
            at=self._clock.now(),
        )
        await self._ledger.record(invocation)
        return invocation

    async def list_invocations(
        self,
        principal: Principal,
        agent_id: AgentId | None = None,
        *,
        status: str | None = None,
        since: datetime | str | None = None,
        until: datetime | str | None = None,
        limit: int | str = 20,
        cursor: str | None = None,
        **unknown: object,
    ) -> InvocationPage:
        """
        Invocations of one agent (deleted ones too), or of all agents of the organisation; newest first.

        Args:
            since: Inclusive; aware, or RFC 3339 text with an offset.
            until: Exclusive.
            limit: 1 to 100.
            cursor: The `next_cursor` of the page before.

        Raises:
            AgentNotFound: There is no such agent.
            ValidationError: A parameter is unknown or out of range.
        """
        agent = None if agent_id is None else await self._agents.one_with_history(agent_id, principal.org_id)
        await self._access.require(principal, Action.READ, agent)
        read = ParameterReader(unknown)
        size = read.whole("limit", limit, maximum=LIMIT_MAX)
        query = InvocationQuery(
            org_id=principal.org_id,
            status=read.choice("status", status, InvocationStatus),
            since=read.moment("since", since),
            until=read.moment("until", until),
            before_id=read.cursor("cursor", cursor),
        )
        read.finish()
        agent_ids = frozenset({agent.id}) if agent else await self._agents.readable_ids(principal)
        query = attrs.evolve(query, agent_ids=agent_ids)
        found = list(await self._invocations.list(query, limit=size + 1))
        more = len(found) > size
        return InvocationPage(items=found[:size], next_cursor=cursor_of(found[size - 1]) if more else None)

    async def get_invocation(
        self, principal: Principal, agent_id: AgentId, invocation_id: UUID
    ) -> ExternalAgentInvocation:
        """
        Raises:
            AgentNotFound: There is no such agent; a deleted one is still there for this.
            InvocationNotFound: The agent has no such invocation.
        """
        agent = await self._agents.one_with_history(agent_id, principal.org_id)
        invocation = await self._invocations.read(principal.org_id, agent.id, invocation_id)
        await self._access.require(principal, Action.READ, agent)
        return invocation

    def _assignment(self, principal: Principal, asked: InvocationRequest, known: KnownAgent) -> Assignment:
        request = asked.admission_of(known.agent, principal, self._ids.new_id())
        return Assignment(principal=principal, agent=known.agent, secrets=known.opened, request=request)


def _require_version(agent: ExternalAgent, versions: Versions | None) -> None:
    if versions is not None and agent.version not in versions:
        raise StaleVersion
