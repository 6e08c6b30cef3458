"""What AgentReader, AgentWriter and InvocationReader promise."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import attrs
import pytest

from external_agents.domain.agent import AgentStatus, ExternalAgent
from external_agents.domain.budget import Money
from external_agents.domain.errors import AgentNotFound, ExternalAgentsError, InvocationNotFound, StaleVersion
from external_agents.domain.ids import created_at_of, first_id_at
from external_agents.domain.invocation import Attempt, ErrorCode, ExternalAgentInvocation, InvocationStatus
from external_agents.domain.json_values import JsonText
from external_agents.ports.repositories import AgentQuery, InvocationQuery
from external_agents.testing.builders import (
    conclude,
    id_at,
    make_agent,
    make_finished_call,
    make_request,
    new_id,
    new_org,
    next_version,
)
from external_agents.testing.stores import Store

NOON = datetime(2026, 3, 10, 12, tzinfo=UTC)


def ids_of(found: Sequence[ExternalAgent] | Sequence[ExternalAgentInvocation]) -> list[UUID]:
    return [item.id for item in found]


async def store_agents(store: Store, org_id: str, *changes: Mapping[str, Any]) -> list[ExternalAgent]:
    """Agents of one organisation, a second apart, oldest first."""
    agents = [
        make_agent(org_id=org_id, id=id_at(NOON + timedelta(seconds=index)), **change)
        for index, change in enumerate(changes)
    ]
    await store.agent_writer.bulk(agents)
    return agents


class AgentRepositoryContract:
    """
    For AgentReader and AgentWriter over one store.

    Fixtures:
        store (Store): of any scope.
    """

    async def test_what_was_created_is_read_as_it_was(self, store: Store) -> None:
        agent = make_agent(
            name="Ünïcode “quoted” ' \\ %",
            description="two\nlines\tand a tab",
            provider="telegram",
            auth_type="oauth2",
            auth_config={"client_id": "id", "token_url": "https://login.example.com/token", "scope": "a b"},
            platform_config={
                "chat_id": -1001234567890,
                "exact": Decimal("0.12345678901234567890"),
                "large": 10**300,
                "nested": {"list": [1, Decimal("2.5"), None, True, {"": "empty name"}]},
            },
            rate_limit_config={"requests_per_minute": 0, "requests_per_day": 1_000_000_000},
            budget_config={"max_cost_per_invocation": Decimal("0.1"), "max_monthly_cost": "0.30", "currency": "EUR"},
            tags=("b", "a", "b", "%_"),
            timeout_s=1.5,
            max_attempts=1,
            status=AgentStatus.INACTIVE,
            sealed={"auth_config.client_secret": b"\x00\xff", "platform_config.bot_token": b"\x01"},
            previous_signing_secret_until=datetime(2026, 3, 11, 12, 0, 0, 123456, tzinfo=UTC),
        )
        await store.agent_writer.create(agent)
        assert await store.agent_reader.read(agent.org_id, agent.id) == agent

    async def test_configs_that_are_absent_stay_absent(self, store: Store) -> None:
        agent = make_agent(rate_limit_config=None, budget_config={})
        await store.agent_writer.create(agent)
        read = await store.agent_reader.read(agent.org_id, agent.id)
        assert read.rate_limit_config is None
        assert read.budget_config == {}

    async def test_an_unknown_agent_is_not_found(self, store: Store) -> None:
        with pytest.raises(AgentNotFound):
            await store.agent_reader.read(new_org(), new_id())
        assert not await store.agent_reader.exists(new_org(), new_id())

    async def test_another_organisations_agent_does_not_exist(self, store: Store) -> None:
        theirs, org_id = make_agent(name="findme"), new_org()
        await store.agent_writer.create(theirs)
        with pytest.raises(AgentNotFound):
            await store.agent_reader.read(org_id, theirs.id)
        query = AgentQuery(org_id=org_id)
        assert not await store.agent_reader.exists(org_id, theirs.id)
        assert not await store.agent_reader.list(query, offset=0, limit=10)
        assert not await store.agent_reader.search(query, "findme", offset=0, limit=10)
        assert await store.agent_reader.count(query) == await store.agent_reader.count(query, text="findme") == 0

    async def test_another_organisations_agent_cannot_be_changed(self, store: Store) -> None:
        theirs = make_agent(sealed={"auth_config.key": b"sealed"})
        await store.agent_writer.create(theirs)
        attempt = attrs.evolve(next_version(theirs, name="taken over"), org_id=new_org())
        for change in (store.agent_writer.update, store.agent_writer.delete):
            with pytest.raises(AgentNotFound):
                await change(attempt)
        assert await store.agent_reader.read(theirs.org_id, theirs.id) == theirs

    async def test_one_id_in_two_organisations_is_two_agents(self, store: Store) -> None:
        first = make_agent(name="first")
        second = make_agent(name="second", id=first.id)
        await store.agent_writer.bulk([first, second])
        await store.agent_writer.update(next_version(first, name="changed"))
        assert (await store.agent_reader.read(first.org_id, first.id)).name == "changed"
        assert await store.agent_reader.read(second.org_id, second.id) == second

    async def test_lists_are_newest_first_and_cut_into_pages(self, store: Store) -> None:
        org_id = new_org()
        agents = await store_agents(store, org_id, *({} for _ in range(7)))
        newest_first = ids_of(agents)[::-1]
        query = AgentQuery(org_id=org_id)
        pages = [await store.agent_reader.list(query, offset=offset, limit=3) for offset in (0, 3, 6, 9)]
        assert [ids_of(page) for page in pages] == [newest_first[:3], newest_first[3:6], newest_first[6:], []]
        found = [await store.agent_reader.search(query, "research", offset=offset, limit=4) for offset in (0, 4, 8)]
        assert [ids_of(page) for page in found] == [newest_first[:4], newest_first[4:], []]
        assert pages[0][0] == agents[-1]

    async def test_lists_hold_deleted_agents_on_request_only(self, store: Store) -> None:
        org_id = new_org()
        active, inactive, gone = await store_agents(store, org_id, {}, {"status": AgentStatus.INACTIVE}, {})
        await store.agent_writer.delete(gone.deleted(by="tester", at=NOON))
        expected = {
            None: {active.id, inactive.id},
            AgentStatus.ACTIVE: {active.id},
            AgentStatus.INACTIVE: {inactive.id},
            AgentStatus.DELETED: {gone.id},
        }
        for status, wanted in expected.items():
            query = AgentQuery(org_id=org_id, status=status)
            assert set(ids_of(await store.agent_reader.list(query, offset=0, limit=10))) == wanted
            assert set(ids_of(await store.agent_reader.search(query, "RESEARCH", offset=0, limit=10))) == wanted
            assert await store.agent_reader.count(query) == len(wanted)
            assert await store.agent_reader.count(query, text="RESEARCH") == len(wanted)

    async def test_a_deleted_agent_is_read_and_exists(self, store: Store) -> None:
        agent = make_agent()
        await store.agent_writer.create(agent)
        await store.agent_writer.delete(agent.deleted(by="remover", at=NOON))
        read = await store.agent_reader.read(agent.org_id, agent.id)
        assert (read.status, read.version, read.updated_by) == (AgentStatus.DELETED, 2, "remover")
        assert await store.agent_reader.exists(agent.org_id, agent.id)

    async def test_filters_match_whole_values_and_combine(self, store: Store) -> None:
        org_id = new_org()
        slack, tagged, both = await store_agents(
            store,
            org_id,
            {"provider": "slack", "tags": ("production",)},
            {"tags": ("prod", "eu")},
            {"provider": "slack", "tags": ("eu", "prod")},
        )
        expected: list[tuple[dict[str, Any], set[UUID]]] = [
            ({"provider": "slack"}, {slack.id, both.id}),
            ({"tag": "prod"}, {tagged.id, both.id}),
            ({"tag": "PROD"}, set()),
            ({"tag": ""}, set()),
            ({"tag": "pro%"}, set()),
            ({"provider": "slack", "tag": "prod"}, {both.id}),
            ({"provider": "slack", "tag": "prod", "status": AgentStatus.INACTIVE}, set()),
        ]
        for filters, wanted in expected:
            query = AgentQuery(org_id=org_id, **filters)
            assert set(ids_of(await store.agent_reader.list(query, offset=0, limit=10))) == wanted, filters
            assert await store.agent_reader.count(query) == len(wanted), filters
            found = await store.agent_reader.search(query, "research", offset=0, limit=10)
            assert set(ids_of(found)) == wanted, filters

    @pytest.mark.parametrize(
        ("text", "wanted"),
        [
            ("rep", {"percent", "plain", "umlaut"}),
            ("REPORT", {"percent", "plain", "umlaut"}),
            ("100%", {"percent"}),
            ("0%_r", {"percent"}),
            ("%", {"percent"}),
            ("_", {"percent"}),
            ("\\", {"umlaut"}),
            ("über", {"umlaut"}),
            ("ÜBER", {"umlaut"}),
            ("sum of all", {"plain"}),
            ("reportsum", set()),
            ("report.um", set()),
        ],
    )
    async def test_search_takes_the_text_literally_whatever_its_case(
        self, store: Store, text: str, wanted: set[str]
    ) -> None:
        org_id = new_org()
        names = {
            "percent": {"name": "100%_Report", "description": ""},
            "plain": {"name": "Report", "description": "Sum of ALL"},
            "umlaut": {"name": "Überreport", "description": "back\\slash"},
        }
        agents = await store_agents(store, org_id, *names.values())
        by_id = {agent.id: key for agent, key in zip(agents, names, strict=True)}
        query = AgentQuery(org_id=org_id)
        found = await store.agent_reader.search(query, text, offset=0, limit=10)
        assert {by_id[agent.id] for agent in found} == wanted
        assert await store.agent_reader.count(query, text=text) == len(wanted)

    async def test_an_update_replaces_every_field(self, store: Store) -> None:
        agent = make_agent(sealed={"auth_config.key": b"old"}, tags=("old",))
        await store.agent_writer.create(agent)
        changed = next_version(
            agent,
            name="new",
            description="new",
            webhook_url="https://other.example.com/",
            auth_type="api_key",
            auth_config={"header_name": "X-Key"},
            platform_config={"a": 1},
            rate_limit_config={"requests_per_hour": 1},
            budget_config={"max_monthly_cost": 1},
            tags=("new", "tags"),
            timeout_s=2.0,
            max_attempts=2,
            status=AgentStatus.INACTIVE,
            sealed={"auth_config.other": b"new"},
            previous_signing_secret_until=NOON,
        )
        await store.agent_writer.update(changed)
        assert await store.agent_reader.read(agent.org_id, agent.id) == changed

    async def test_an_update_of_an_agent_that_is_not_there(self, store: Store) -> None:
        with pytest.raises(AgentNotFound):
            await store.agent_writer.update(next_version(make_agent()))
        with pytest.raises(AgentNotFound):
            await store.agent_writer.delete(make_agent().deleted(by="tester", at=NOON))

    async def test_only_the_next_version_is_stored(self, store: Store) -> None:
        agent = make_agent()
        await store.agent_writer.create(agent)
        second = next_version(agent, name="second")
        await store.agent_writer.update(second)
        skipped = attrs.evolve(second, version=4, name="skipped")
        for stale in (agent, second, skipped):
            for change in (store.agent_writer.update, store.agent_writer.delete):
                with pytest.raises(StaleVersion):
                    await change(stale)
        assert await store.agent_reader.read(agent.org_id, agent.id) == second

    async def test_of_concurrent_updates_one_is_stored(self, store: Store) -> None:
        agent = make_agent()
        await store.agent_writer.create(agent)
        rivals = [next_version(agent, name=f"rival {number}") for number in range(12)]
        results = await asyncio.gather(*(store.agent_writer.update(rival) for rival in rivals), return_exceptions=True)
        [winner] = [rival for rival, result in zip(rivals, results, strict=True) if result is None]
        assert all(isinstance(result, StaleVersion) for result in results if result is not None)
        assert await store.agent_reader.read(agent.org_id, agent.id) == winner

    async def test_a_deletion_forgets_the_secrets(self, store: Store) -> None:
        agent = make_agent(
            auth_type="api_key",
            auth_config={"header_name": "X-Key"},
            sealed={"auth_config.key": b"sealed", "signing_secret": b"sealed", "signing_secret.previous": b"sealed"},
            previous_signing_secret_until=NOON,
        )
        await store.agent_writer.create(agent)
        await store.agent_writer.delete(agent.deleted(by="tester", at=NOON))
        read = await store.agent_reader.read(agent.org_id, agent.id)
        assert read.sealed == {}
        assert read.previous_signing_secret_until is None
        assert read.auth_config == {"header_name": "X-Key"}

    async def test_a_deletion_keeps_the_invocations(self, store: Store) -> None:
        agent = make_agent()
        await store.agent_writer.create(agent)
        call = make_finished_call(agent)
        await (await store.new_ledger()).record(call)
        await store.agent_writer.delete(agent.deleted(by="tester", at=NOON))
        assert await store.invocation_reader.read(agent.org_id, agent.id, call.id) == call

    async def test_bulk_creates_all(self, store: Store) -> None:
        agents = [make_agent(name=f"agent {number}") for number in range(20)]
        await store.agent_writer.bulk(agents)
        await store.agent_writer.bulk([])
        for agent in agents:
            assert await store.agent_reader.read(agent.org_id, agent.id) == agent

    async def test_bulk_creates_none_when_one_cannot_be(self, store: Store) -> None:
        there = make_agent(name="there before")
        await store.agent_writer.create(there)
        before, after = make_agent(org_id=there.org_id), make_agent()
        with pytest.raises(ExternalAgentsError):
            await store.agent_writer.bulk([before, attrs.evolve(there, name="impostor"), after])
        assert await store.agent_reader.read(there.org_id, there.id) == there
        assert not await store.agent_reader.exists(before.org_id, before.id)
        assert not await store.agent_reader.exists(after.org_id, after.id)

    async def test_an_agent_is_not_created_over_another(self, store: Store) -> None:
        there = make_agent(name="there before")
        await store.agent_writer.create(there)
        with pytest.raises(ExternalAgentsError):
            await store.agent_writer.create(attrs.evolve(there, name="impostor"))
        assert await store.agent_reader.read(there.org_id, there.id) == there


async def store_calls(store: Store, agent: ExternalAgent, *changes: Mapping[str, Any]) -> list[ExternalAgentInvocation]:
    """Finished calls of one agent, a second apart from noon on, oldest first; changes may give another id."""
    ledger = await store.new_ledger()
    calls = [
        make_finished_call(agent, **{"id": id_at(NOON + timedelta(seconds=index)), **change})
        for index, change in enumerate(changes)
    ]
    for call in calls:
        await ledger.record(call)
    return calls


async def stored_agent(store: Store, **changes: Any) -> ExternalAgent:
    agent = make_agent(**changes)
    await store.agent_writer.create(agent)
    return agent


class InvocationReaderContract:
    """
    For InvocationReader; the ledger of the same store writes what it reads.

    Fixtures:
        store (Store): of any scope.
    """

    async def test_what_was_recorded_is_read_as_it_was(self, store: Store) -> None:
        agent = await stored_agent(store)
        at = NOON + timedelta(microseconds=654321)
        [call] = await store_calls(
            store,
            agent,
            {
                "lineage_hop_id": "hop-7",
                "initiated_by": "someone else",
                "status": InvocationStatus.FAILED,
                "request": JsonText(
                    '{ "big": 12345678901234567890123, "e": 1.50e+2, "b":1,"a":2,"b":3 , "n":"\\u0000"}'
                ),
                "response": JsonText('"\\ud800 lone, \\u0000 zero, ünïcode"'),
                "response_status": 503,
                "attempts": (
                    Attempt(at=at, error=ErrorCode.CONNECTION_FAILED, duration_ms=0),
                    Attempt(at=at, status=503, duration_ms=30_000),
                ),
                "execution_time_ms": 30_001,
                "error_code": ErrorCode.HTTP_STATUS,
                "error_message": "The agent answered 503.",
                "cost": None,
                "completed_at": at,
            },
        )
        assert await store.invocation_reader.read(agent.org_id, agent.id, call.id) == call

    async def test_what_was_admitted_and_settled_is_read_as_it_was(self, store: Store) -> None:
        agent = await stored_agent(store, budget_config={"max_cost_per_invocation": "0.5", "currency": "EUR"})
        ledger = await store.new_ledger()
        request = make_request(agent, lineage_hop_id="hop", request=JsonText("[1.10, null ]"))
        admitted = (await ledger.admit(request)).invocation
        assert await store.invocation_reader.read(agent.org_id, agent.id, admitted.id) == admitted
        settled = conclude(admitted, cost=Money(Decimal("0.7"), "EUR"), cost_overrun=True)
        await ledger.settle(settled)
        assert await store.invocation_reader.read(agent.org_id, agent.id, admitted.id) == settled

    async def test_an_answer_that_is_null_is_no_missing_answer(self, store: Store) -> None:
        agent = await stored_agent(store)
        null, missing = await store_calls(
            store, agent, {"response": JsonText("null")}, {"response": None, "response_status": None}
        )
        assert (await store.invocation_reader.read(agent.org_id, agent.id, null.id)).response == JsonText("null")
        assert (await store.invocation_reader.read(agent.org_id, agent.id, missing.id)).response is None

    async def test_an_invocation_is_found_under_its_agent_and_organisation_only(self, store: Store) -> None:
        agent = await stored_agent(store)
        sibling = await stored_agent(store, org_id=agent.org_id)
        [call] = await store_calls(store, agent, {})
        assert await store.invocation_reader.exists(agent.org_id, call.id)
        for org_id, agent_id, call_id in [
            (agent.org_id, agent.id, new_id()),
            (agent.org_id, sibling.id, call.id),
            (new_org(), agent.id, call.id),
        ]:
            with pytest.raises(InvocationNotFound):
                await store.invocation_reader.read(org_id, agent_id, call_id)
        assert not await store.invocation_reader.exists(agent.org_id, new_id())

    async def test_another_organisations_invocations_do_not_exist(self, store: Store) -> None:
        theirs = await stored_agent(store)
        [call] = await store_calls(store, theirs, {})
        org_id = new_org()
        for query in (InvocationQuery(org_id=org_id), InvocationQuery(org_id=org_id, agent_ids=frozenset({theirs.id}))):
            assert not await store.invocation_reader.list(query, limit=10)
            assert await store.invocation_reader.count(query) == 0
            assert not await store.invocation_reader.search(query, call.trace_id, limit=10)
        assert not await store.invocation_reader.exists(org_id, call.id)

    async def test_lists_are_newest_first_over_all_agents(self, store: Store) -> None:
        first = await stored_agent(store)
        second = await stored_agent(store, org_id=first.org_id)
        third = await stored_agent(store, org_id=first.org_id)
        calls = []
        for index, agent in enumerate([first, second, third] * 2):
            calls += await store_calls(store, agent, {"id": id_at(NOON + timedelta(seconds=index))})
        newest_first = calls[::-1]

        async def listed(agent_ids: frozenset[UUID] | None, limit: int = 10) -> list[ExternalAgentInvocation]:
            query = InvocationQuery(org_id=first.org_id, agent_ids=agent_ids)
            found = await store.invocation_reader.list(query, limit=limit)
            if limit == 10:
                assert await store.invocation_reader.count(query) == len(found)
            return list(found)

        assert await listed(None) == newest_first
        assert await listed(None, limit=2) == newest_first[:2]
        assert await listed(frozenset({first.id})) == [calls[3], calls[0]]
        assert await listed(frozenset({first.id, third.id})) == [calls[5], calls[3], calls[2], calls[0]]
        assert await listed(frozenset({new_id()})) == []
        assert await listed(frozenset()) == []

    async def test_the_status_filter(self, store: Store) -> None:
        agent = await stored_agent(store)
        succeeded, failed, unknown = await store_calls(
            store,
            agent,
            {},
            {"status": InvocationStatus.FAILED},
            {"status": InvocationStatus.UNKNOWN},
        )
        running = (await (await store.new_ledger()).admit(make_request(agent))).invocation
        for call in (succeeded, failed, unknown, running):
            query = InvocationQuery(org_id=agent.org_id, status=call.status)
            assert ids_of(await store.invocation_reader.list(query, limit=10)) == [call.id]
            assert await store.invocation_reader.count(query) == 1
        cancelled = InvocationQuery(org_id=agent.org_id, status=InvocationStatus.CANCELLED)
        assert not await store.invocation_reader.list(cancelled, limit=10)

    async def test_since_is_inclusive_and_until_exclusive(self, store: Store) -> None:
        agent = await stored_agent(store)
        millisecond = timedelta(milliseconds=1)
        smallest = first_id_at(NOON + millisecond)
        largest = UUID(int=smallest.int | 0xFFF << 64 | (1 << 62) - 1)
        calls = await store_calls(
            store,
            agent,
            {"id": id_at(NOON)},
            {"id": smallest},
            {"id": largest},
            {"id": id_at(NOON + 2 * millisecond)},
        )
        moments = [NOON + timedelta(microseconds=step * 250) for step in range(-4, 16)]
        for since in (None, *moments):
            for until in (None, *moments):
                query = InvocationQuery(org_id=agent.org_id, since=since, until=until)
                wanted = {
                    call.id
                    for call in calls
                    if (since is None or call.created_at >= since) and (until is None or call.created_at < until)
                }
                assert set(ids_of(await store.invocation_reader.list(query, limit=10))) == wanted, (since, until)
        query = InvocationQuery(org_id=agent.org_id, since=NOON + millisecond, until=NOON + 2 * millisecond)
        assert await store.invocation_reader.count(query) == 2

    async def test_times_from_the_ends_of_the_calendar(self, store: Store) -> None:
        agent = await stored_agent(store)
        [call] = await store_calls(store, agent, {})
        first, last = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
        everything = InvocationQuery(org_id=agent.org_id, since=first, until=last)
        assert ids_of(await store.invocation_reader.list(everything, limit=10)) == [call.id]
        nothing = InvocationQuery(org_id=agent.org_id, since=last, until=first)
        assert not await store.invocation_reader.list(nothing, limit=10)

    async def test_pages_by_cursor_show_everything_once(self, store: Store) -> None:
        agent = await stored_agent(store)
        calls = await store_calls(store, agent, *({"id": id_at(NOON)} for _ in range(5)), {}, {})
        seen: list[UUID] = []
        before_id: UUID | None = None
        while page := await store.invocation_reader.list(
            InvocationQuery(org_id=agent.org_id, agent_ids=frozenset({agent.id}), before_id=before_id), limit=2
        ):
            seen += ids_of(page)
            before_id = page[-1].id
        assert seen == sorted(ids_of(calls), reverse=True)

    async def test_search_finds_a_trace(self, store: Store) -> None:
        agent = await stored_agent(store)
        sibling = await stored_agent(store, org_id=agent.org_id)
        trace_id = "0af7651916cd43dd8448eb211c80319c"
        [first, _, second] = await store_calls(store, agent, {"trace_id": trace_id}, {}, {"trace_id": trace_id})
        [third] = await store_calls(store, sibling, {"trace_id": trace_id, "id": id_at(NOON + timedelta(minutes=1))})
        query = InvocationQuery(org_id=agent.org_id)
        found = await store.invocation_reader.search(query, trace_id, limit=10)
        assert ids_of(found) == [third.id, second.id, first.id]
        assert ids_of(await store.invocation_reader.search(query, trace_id, limit=1)) == [third.id]
        narrowed = attrs.evolve(query, agent_ids=frozenset({agent.id}), until=created_at_of(second.id))
        assert ids_of(await store.invocation_reader.search(narrowed, trace_id, limit=10)) == [first.id]
