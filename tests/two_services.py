"""What must hold where an agent is changed through one process and invoked through another; for any store."""

from __future__ import annotations

import asyncio
import base64
import hmac
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import attrs
import pytest

from external_agents import (
    AgentInactive,
    AgentNotFound,
    ExternalAgent,
    ExternalAgentsError,
    ExternalAgentService,
    PermissionDenied,
    Principal,
    ValidationError,
)
from external_agents.domain.access import AccessRequest, Action, Decision
from external_agents.domain.agent import AgentStatus
from external_agents.domain.auth import FixedHeaders
from external_agents.ports.policy import PolicyDecisionPoint
from external_agents.ports.repositories import AgentQuery, AgentReader
from external_agents.ports.transport import AgentRequest
from external_agents.testing.builders import ALL_PERMISSIONS
from external_agents.testing.fakes import RecordingObservability, ScriptedTransport

ALICE = Principal("acme", "alice", ALL_PERMISSIONS)
DOCUMENT: Mapping[str, Any] = {
    "name": "Research",
    "provider": "custom",
    "webhook_url": "https://agent.example.com/hook",
    "auth_type": "bearer",
    "auth_config": {"token": "first"},
}
SECRETS = tuple(f"whsec_{letter * 32}" for letter in "AB")
CLOSED = "closed"
BOB = Principal("acme", "bob", ALL_PERMISSIONS)
CLOSED_TO_BOB = "closed to bob"


class TagPolicy(PolicyDecisionPoint):
    """Nobody may invoke what is tagged as closed, nor `bob` what is `closed to bob`."""

    def __init__(self) -> None:
        self.asked = 0

    @property
    def judges_lists_by_agent(self) -> bool:
        return True

    async def decide(self, requests: Sequence[AccessRequest]) -> Sequence[Decision]:
        self.asked += len(requests)
        return [Decision(allowed=not _is_closed(request)) for request in requests]


def _is_closed(request: AccessRequest) -> bool:
    if request.agent is None or request.action is not Action.INVOKE:
        return False
    return not {CLOSED, f"{CLOSED} to {request.principal.subject}"}.isdisjoint(request.agent.tags)


class CountingReader(AgentReader):
    """Counts what is read one by one, and does as the test wishes while it is under way."""

    def __init__(self, reader: AgentReader) -> None:
        self._reader = reader
        self.reads = 0
        self.before: Callable[[], Any] = _nothing
        self.after: Callable[[], Any] = _nothing

    async def read(self, org_id: str, agent_id: Any) -> ExternalAgent:
        self.reads += 1
        await self.before()
        agent = await self._reader.read(org_id, agent_id)
        await self.after()
        return agent

    async def list(self, query: AgentQuery, *, offset: int, limit: int) -> Sequence[ExternalAgent]:
        return await self._reader.list(query, offset=offset, limit=limit)

    async def count(self, query: AgentQuery, *, text: str | None = None) -> int:
        return await self._reader.count(query, text=text)

    async def exists(self, org_id: str, agent_id: Any) -> bool:
        return await self._reader.exists(org_id, agent_id)

    async def search(self, query: AgentQuery, text: str, *, offset: int, limit: int) -> Sequence[ExternalAgent]:
        return await self._reader.search(query, text, offset=offset, limit=limit)


async def _nothing() -> None:
    pass


@attrs.frozen
class Side:
    """One process."""

    service: ExternalAgentService
    transport: ScriptedTransport
    reader: CountingReader
    observability: RecordingObservability

    async def told(self, agent: ExternalAgent) -> str | AgentRequest:
        """What an invocation comes to: the request that the agent got, or the name of the refusal."""
        sent = len(self.transport.requests)
        try:
            await self.service.invoke_agent(ALICE, agent.id, {"input": 1})
        except ExternalAgentsError as refusal:
            assert len(self.transport.requests) == sent, "a refusal sends nothing"
            return type(refusal).__name__
        return self.transport.requests[-1]


Sides: TypeAlias = tuple[Side, Side]
Patch: TypeAlias = Mapping[str, Any]


def token_of(request: str | AgentRequest) -> str:
    assert isinstance(request, AgentRequest), request
    assert isinstance(request.credentials, FixedHeaders)
    return request.credentials.headers["Authorization"].removeprefix("Bearer ")


def signed_with(request: str | AgentRequest, *secrets: str) -> list[int]:
    """Which of `secrets`, by their places, signed the request, in the order of the signatures."""
    assert isinstance(request, AgentRequest), request
    if "webhook-signature" not in request.headers:
        return []
    message = f"{request.headers['webhook-id']}.{request.headers['webhook-timestamp']}.{request.body.text}".encode()
    keys = [base64.b64decode(secret.removeprefix("whsec_")) for secret in secrets]
    signed = [f"v1,{base64.b64encode(hmac.digest(key, message, 'sha256')).decode()}" for key in keys]
    return [signed.index(signature) for signature in request.headers["webhook-signature"].split(" ")]


class ChangesHoldElsewhere:
    """
    Fixtures:
        sides (Sides): two services of their own over one store, with TagPolicy.
    """

    async def known(self, sides: Sides, **fields: Any) -> ExternalAgent:
        """An agent that both sides have invoked."""
        agent = await sides[0].service.create_agent(ALICE, {**DOCUMENT, **fields})
        for side in sides:
            assert token_of(await side.told(agent)) == "first"
        return agent

    async def test_an_agent_that_is_known_is_not_read_again(self, sides: Sides) -> None:
        agent = await self.known(sides)
        reads = [side.reader.reads for side in sides]
        for side in sides:
            assert token_of(await side.told(agent)) == "first"
        assert [side.reader.reads for side in sides] == reads == [1, 1]

    async def test_a_deleted_agent_is_refused(self, sides: Sides) -> None:
        here, there = sides
        agent = await self.known(sides)
        await here.service.delete_agent(ALICE, agent.id)
        assert [await side.told(agent) for side in (there, here, there)] == ["AgentNotFound"] * 3

    async def test_switched_off_and_on_again(self, sides: Sides) -> None:
        here, there = sides
        agent = await self.known(sides)
        for _ in range(2):
            await here.service.update_agent(ALICE, agent.id, {"status": "inactive"})
            assert [await side.told(agent) for side in (there, here, there)] == ["AgentInactive"] * 3
            await here.service.update_agent(ALICE, agent.id, {"status": "active"})
            assert [token_of(await side.told(agent)) for side in (there, here, there)] == ["first"] * 3

    async def test_permitted_no_more_and_permitted_again(self, sides: Sides) -> None:
        here, there = sides
        agent = await self.known(sides)
        for _ in range(2):
            await here.service.update_agent(ALICE, agent.id, {"tags": [CLOSED]})
            assert [await side.told(agent) for side in (there, here, there)] == ["PermissionDenied"] * 3
            await here.service.update_agent(ALICE, agent.id, {"tags": []})
            assert [token_of(await side.told(agent)) for side in (there, here, there)] == ["first"] * 3

    async def test_a_denial_is_of_the_agent_as_it_is(self, sides: Sides) -> None:
        """What a policy says to what is known of an agent is no record and no answer where the agent has changed."""
        here, there = sides
        agent = await self.known(sides, tags=[CLOSED_TO_BOB])
        await here.service.update_agent(ALICE, agent.id, {"tags": []})
        there.observability.records.clear()
        await there.service.invoke_agent(BOB, agent.id, None)
        assert [record.allowed for record in there.observability.decisions] == [True]
        await here.service.update_agent(ALICE, agent.id, {"tags": [CLOSED_TO_BOB]})
        await there.told(agent)
        there.observability.records.clear()
        with pytest.raises(PermissionDenied):
            await there.service.invoke_agent(BOB, agent.id, None)
        assert [record.allowed for record in there.observability.decisions] == [False]

    async def test_new_credentials_and_a_new_place(self, sides: Sides) -> None:
        here, there = sides
        agent = await self.known(sides)
        await here.service.update_agent(ALICE, agent.id, {"auth_config": {"token": "second"}})
        assert token_of(await there.told(agent)) == "second"
        moved = {"webhook_url": "https://other.example.com/", "auth_config": {"token": "third"}, "timeout_s": 3}
        await here.service.update_agent(ALICE, agent.id, moved)
        for side in (there, here):
            request = await side.told(agent)
            assert isinstance(request, AgentRequest)
            assert (request.url, token_of(request)) == ("https://other.example.com/", "third")
            assert request.timeout_s <= 3

    async def test_new_signing_secrets(self, sides: Sides) -> None:
        here, there = sides
        agent = await self.known(sides)
        for secret, signed in ((SECRETS[0], [0]), (SECRETS[1], [1, 0]), (None, []), (SECRETS[1], [1])):
            await here.service.update_agent(ALICE, agent.id, {"signing_secret": secret})
            for side in (there, here, there):
                assert signed_with(await side.told(agent), *SECRETS) == signed

    async def test_limits_are_the_new_ones(self, sides: Sides) -> None:
        here, there = sides
        agent = await self.known(sides)
        await here.service.update_agent(ALICE, agent.id, {"rate_limit_config": {"requests_per_day": 2}})
        assert [await side.told(agent) for side in (there, here)] == ["RateLimited"] * 2
        await here.service.update_agent(ALICE, agent.id, {"rate_limit_config": {"requests_per_day": 3}})
        assert token_of(await there.told(agent)) == "first"
        budget = {"budget_config": {"max_cost_per_invocation": 1, "max_monthly_cost": 0}, "rate_limit_config": None}
        await here.service.update_agent(ALICE, agent.id, budget)
        assert [await side.told(agent) for side in (there, here)] == ["BudgetExceeded"] * 2
        await there.service.update_agent(ALICE, agent.id, {"budget_config": {"max_monthly_cost": 2}})
        assert [token_of(await side.told(agent)) for side in (here, there)] == ["first"] * 2

    async def test_what_is_asked_wrongly_of_an_agent_that_is_gone_is_not_found(self, sides: Sides) -> None:
        """Existence comes before permission and permission before the input, on the agent as it is."""
        here, there = sides
        agent = await self.known(sides)
        await here.service.update_agent(ALICE, agent.id, {"tags": [CLOSED]})
        with pytest.raises(PermissionDenied):
            await there.service.invoke_agent(ALICE, agent.id, object())
        await here.service.update_agent(ALICE, agent.id, {"tags": [], "status": "inactive"})
        with pytest.raises(ValidationError):
            await there.service.invoke_agent(ALICE, agent.id, object())
        with pytest.raises(AgentInactive):
            await there.service.invoke_agent(ALICE, agent.id, None)
        await here.service.delete_agent(ALICE, agent.id)
        with pytest.raises(AgentNotFound):
            await there.service.invoke_agent(ALICE, agent.id, object())

    async def test_another_organisation_knows_nothing_of_it(self, sides: Sides) -> None:
        agent = await self.known(sides)
        for side in sides:
            with pytest.raises(AgentNotFound):
                await side.service.invoke_agent(Principal("other", "eve", ALL_PERMISSIONS), agent.id, None)

    async def test_those_who_miss_it_at_once_read_it_once(self, sides: Sides) -> None:
        here, there = sides
        agent = await here.service.create_agent(ALICE, DOCUMENT)
        entered = asyncio.Event()
        opened = asyncio.Event()

        async def held() -> None:
            entered.set()
            await opened.wait()

        there.reader.before = held
        calls = [asyncio.create_task(there.told(agent)) for _ in range(20)]
        await entered.wait()
        opened.set()
        assert {token_of(told) for told in await asyncio.gather(*calls)} == {"first"}
        assert there.reader.reads == 1

    async def test_whoever_goes_away_while_reading_takes_nothing_from_the_others(self, sides: Sides) -> None:
        here, there = sides
        agent = await here.service.create_agent(ALICE, DOCUMENT)
        entered, opened = asyncio.Event(), asyncio.Event()

        async def held() -> None:
            entered.set()
            await opened.wait()

        there.reader.before = held
        leader = asyncio.create_task(there.told(agent))
        await entered.wait()
        waiting, leaving = asyncio.create_task(there.told(agent)), asyncio.create_task(there.told(agent))
        await asyncio.sleep(0)
        for task in (leaving, leader):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        opened.set()
        assert token_of(await waiting) == "first"

    async def test_a_read_that_began_before_the_change_decides_nothing(self, sides: Sides) -> None:
        """Whoever joins a read may get an older agent than there is; a refusal must not come from it."""
        here, there = sides
        agent = await here.service.create_agent(ALICE, {**DOCUMENT, "status": "inactive"})
        entered, opened = asyncio.Event(), asyncio.Event()

        async def held() -> None:
            there.reader.after = _nothing
            entered.set()
            await opened.wait()

        there.reader.after = held
        early = asyncio.create_task(there.told(agent))
        await entered.wait()
        await here.service.update_agent(ALICE, agent.id, {"status": "active"})
        late = asyncio.create_task(there.told(agent))
        await asyncio.sleep(0)
        opened.set()
        assert await early == "AgentInactive", "as it was when that call read it"
        assert token_of(await late) == "first"

    async def test_changes_while_many_invoke(self, sides: Sides) -> None:
        """What is sent carries the token and goes to the place of one version, whatever changes meanwhile."""
        agent = await self.known(sides)
        done = False

        async def invoking(side: Side) -> None:
            while not done:
                await asyncio.sleep(0)
                with suppress(AgentInactive):
                    await side.service.invoke_agent(ALICE, agent.id, None)

        callers = [asyncio.create_task(invoking(side)) for side in sides for _ in range(4)]
        for number in range(12):
            fields = {
                "webhook_url": f"https://agent{number}.example.com/",
                "auth_config": {"token": f"agent{number}"},
                "status": "active" if number % 3 else "inactive",
            }
            changed = await sides[number % 2].service.update_agent(ALICE, agent.id, fields)
            for side in sides:
                told = await self.told_of(side, agent)
                assert told == ("AgentInactive" if changed.status is AgentStatus.INACTIVE else changed.webhook_url)
        done = True
        await asyncio.gather(*callers)
        for side in sides:
            for request in side.transport.requests[1:]:
                token = token_of(request)
                assert token == "first" or request.url == f"https://{token}.example.com/"

    async def told_of(self, side: Side, agent: ExternalAgent) -> str:
        """`Side.told` beside others who invoke: the URL of this very invocation, or the name of the refusal."""
        try:
            invocation = await side.service.invoke_agent(ALICE, agent.id, None)
        except ExternalAgentsError as refusal:
            return type(refusal).__name__
        key = str(invocation.id)
        [url] = [request.url for request in side.transport.requests if request.headers["Idempotency-Key"] == key]
        return url
