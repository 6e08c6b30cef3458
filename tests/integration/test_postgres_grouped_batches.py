"""Group commit: what shares a call, and that everyone gets the answer that is his own."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections import Counter
from contextlib import suppress
from contextvars import ContextVar
from decimal import Decimal
from itertools import permutations
from typing import Any
from uuid import uuid4

import attrs
import psycopg
import pytest
from psycopg import sql
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncEngine

from books import assert_books_balance
from external_agents.adapters.postgres.agents import PostgresAgents
from external_agents.adapters.postgres.invocations import PostgresInvocations
from external_agents.adapters.postgres.ledger import PostgresLedger
from external_agents.adapters.postgres.schema import migrate
from external_agents.domain.agent import AgentStatus
from external_agents.domain.errors import AgentInactive, AgentNotFound, InvocationNotFound, StaleVersion, Unavailable
from external_agents.domain.invocation import InvocationStatus
from external_agents.domain.json_values import JsonText
from external_agents.domain.rate_limit import RateQuotas
from external_agents.domain.refusals import BudgetExceeded, RateLimited
from external_agents.ports.ledger import LEASE_S, Admission
from external_agents.ports.observability import BatchRecord
from external_agents.ports.rate_limiter import Place
from external_agents.testing.builders import (
    conclude,
    costing,
    id_at,
    make_agent,
    make_request,
    new_id,
    new_org,
    next_version,
    refused,
    timed_out,
)
from garbage import garbage
from grouped import LAST_MONTH, THIS_MONTH, admitted, held_up, names, settled_down, stored_agents, watched
from postgres_server import OpenEngine, PostgresServer, ShiftedClock, dsn, wait_for_lock

PLACE = Place(RateQuotas(), token=None)


async def test_what_comes_together_shares_a_call(postgres_agents: PostgresAgents, postgres_engine: AsyncEngine) -> None:
    one, other = await stored_agents(postgres_agents, 2, budget_config={"max_cost_per_invocation": 1})
    scene = await watched(postgres_engine)
    ones, others = await asyncio.gather(scene.running(one, 20), scene.running(other, 20))
    running = ones + others
    assert scene.sizes == [(40, 0)]
    payloads = [JsonText(f'"{number}"') for number in range(30)]
    results = await asyncio.gather(
        *(scene.ledger.settle(conclude(invocation, costing("0.5"))) for invocation in running),
        *(scene.ledger.admit(make_request(agent, request=text)) for agent in (one, other) for text in payloads),
    )
    assert scene.sizes[1:] == [(60, 40)]
    assert [result.id for result in results[:40]] == [invocation.id for invocation in running]
    assert [result.invocation.request for result in results[40:]] == payloads * 2
    assert {result.invocation.external_agent_id for result in results[40:70]} == {one.id}


async def test_who_is_refused_leaves_nothing_to_the_garbage_collector(
    postgres_agents: PostgresAgents, postgres_engine: AsyncEngine
) -> None:
    [agent] = await stored_agents(postgres_agents, 1, status=AgentStatus.INACTIVE)
    scene = await watched(postgres_engine)
    with garbage() as left:
        for _ in range(20):
            with suppress(AgentInactive):
                await scene.ledger.admit(make_request(agent))
    assert len(left) < 20


async def test_a_settlement_that_fails_leaves_nothing_to_the_garbage_collector(
    postgres_agents: PostgresAgents, postgres_engine: AsyncEngine, postgres_url: str, open_engine: OpenEngine
) -> None:
    [agent] = await stored_agents(postgres_agents, 1)
    [invocation] = await (await watched(postgres_engine)).running(agent)
    nowhere = make_url(postgres_url).set(database="nowhere").render_as_string(hide_password=False)
    ledger, finished = PostgresLedger(open_engine(nowhere), uuid4()), conclude(invocation)
    with garbage() as left:
        for _ in range(20):
            with suppress(Unavailable):
                await ledger.settle(finished)
    assert not [one for one in left if isinstance(one, asyncio.Future)], Counter(type(one).__name__ for one in left)


async def test_a_batch_is_bounded(postgres_agents: PostgresAgents, postgres_engine: AsyncEngine) -> None:
    [agent] = await stored_agents(postgres_agents, 1)
    scene = await watched(postgres_engine)
    await scene.running(agent, 300)
    assert sum(admissions for admissions, _ in scene.sizes) == 300
    assert max(scene.sizes) == (128, 0)
    assert scene.batches[0].waiting == 300 - 128
    assert scene.batches[-1].waiting == 0
    large = JsonText('"' + "x" * 1_000_000 + '"')
    before = len(scene.sizes)
    await scene.running(agent, 12, request=large)
    assert sum(admissions for admissions, _ in scene.sizes[before:]) == 12
    assert max(admissions for admissions, _ in scene.sizes[before:]) <= 5


async def test_every_caller_in_a_batch_gets_the_answer_that_is_its_own(
    postgres_agents: PostgresAgents, postgres_engine: AsyncEngine
) -> None:
    """Agents in every state, limits of every kind, mixed."""
    org_id = new_org()
    limited = make_agent(org_id=org_id, rate_limit_config={"requests_per_minute": 3, "requests_per_day": 100})
    poor = make_agent(
        org_id=org_id, budget_config={"max_cost_per_invocation": "0.4", "max_monthly_cost": 1, "currency": "EUR"}
    )
    other_org_id = new_org()
    both = make_agent(
        org_id=other_org_id,
        rate_limit_config={"requests_per_hour": 4},
        budget_config={"max_cost_per_invocation": 1, "max_monthly_cost": 2},
    )
    free, stale = (make_agent(org_id=org_id) for _ in range(2))
    asleep, gone = (make_agent(org_id=other_org_id) for _ in range(2))
    await postgres_agents.bulk([limited, poor, both, free, stale, asleep, gone])
    await postgres_agents.update(next_version(stale))
    asleep = next_version(asleep, status=AgentStatus.INACTIVE)
    await postgres_agents.update(asleep)
    await postgres_agents.delete(next_version(gone, status=AgentStatus.DELETED))
    unknown = make_agent(org_id=other_org_id)
    scene = await watched(postgres_engine)
    agents = [limited, poor, both, free, stale, asleep, gone, unknown]
    results = await settled_down(*(scene.ledger.admit(make_request(agent)) for _ in range(6) for agent in agents))
    assert scene.sizes == [(48, 0)]
    by_agent = {agent.id: results[number :: len(agents)] for number, agent in enumerate(agents)}
    assert [type(result) for result in by_agent[limited.id]] == [Admission] * 3 + [RateLimited] * 3
    used = [[quota.used for quota in result.quotas.quotas] for result in by_agent[limited.id]]  # type: ignore[union-attr]
    assert used == [[1, 1], [2, 2], [3, 3], [3, 3], [3, 3], [3, 3]]
    assert [type(result) for result in by_agent[poor.id]] == [Admission] * 2 + [BudgetExceeded] * 4
    assert [type(result) for result in by_agent[both.id]] == [Admission] * 2 + [BudgetExceeded] * 4
    assert [type(result) for result in by_agent[free.id]] == [Admission] * 6
    assert names(by_agent[stale.id]) == {StaleVersion.__name__}
    assert names(by_agent[asleep.id]) == {AgentInactive.__name__}
    assert names(by_agent[gone.id]) == names(by_agent[unknown.id]) == {AgentNotFound.__name__}
    assert [str(result.invocation.reservation) for result in admitted(by_agent[poor.id])] == ["0.4 EUR"] * 2


RIVAL = """
import asyncio, json, sys
from uuid import UUID, uuid4
from external_agents.adapters.postgres.agents import PostgresAgents
from external_agents.adapters.postgres.engine import create_engine
from external_agents.adapters.postgres.ledger import PostgresLedger
from external_agents.testing.builders import make_request

async def main(url, org_id, agent_id, callers):
    engine = create_engine(url)
    agent = await PostgresAgents(engine, key_id_of=lambda envelope: "").read(org_id, UUID(agent_id))
    batches = []
    ledger = PostgresLedger(engine, uuid4(), observe=batches.append)
    await ledger.heartbeat()
    print("ready", flush=True)
    sys.stdin.readline()
    requests = [ledger.admit(make_request(agent)) for _ in range(int(callers))]
    results = await asyncio.gather(*requests, return_exceptions=True)
    print(json.dumps([[type(result).__name__ for result in results], len(batches)]), flush=True)
    await engine.dispose()

asyncio.run(main(*sys.argv[1:]))
"""
ROOM = 37
CALLERS_EACH = 400


@pytest.mark.parametrize(
    ("limits", "refusal"),
    [
        ({"rate_limit_config": {"requests_per_minute": ROOM}}, "RateLimited"),
        ({"rate_limit_config": {"requests_per_hour": ROOM, "requests_per_minute": 1000}}, "RateLimited"),
        ({"rate_limit_config": {"requests_per_day": ROOM}}, "RateLimited"),
        ({"budget_config": {"max_cost_per_invocation": "0.1", "max_monthly_cost": "3.7"}}, "BudgetExceeded"),
        ({"budget_config": {"max_cost_per_invocation": "0.1", "max_monthly_cost": "3.799999999"}}, "BudgetExceeded"),
    ],
)
async def test_room_for_some_admits_exactly_some_in_batches_of_several_processes(
    postgres_url: str,
    postgres_agents: PostgresAgents,
    postgres_engine: AsyncEngine,
    limits: dict[str, dict[str, object]],
    refusal: str,
) -> None:
    agent = make_agent(**limits)
    await postgres_agents.create(agent)
    rivals = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", RIVAL, postgres_url, agent.org_id, str(agent.id), str(CALLERS_EACH)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        for _ in range(2)
    ]
    for rival in rivals:
        assert rival.stdout is not None
        assert await rival.stdout.readline() == b"ready\n"
    scene = await watched(postgres_engine)
    mine = asyncio.gather(
        *(scene.ledger.admit(make_request(agent)) for _ in range(CALLERS_EACH)), return_exceptions=True
    )
    answers = [(await rival.communicate(b"go\n"))[0] for rival in rivals]
    outcomes = Counter(type(result).__name__ for result in await mine)
    for answer in answers:
        results, batches = json.loads(answer)
        outcomes += Counter(results)
        assert batches < CALLERS_EACH / 10
    assert outcomes == {"Admission": ROOM, refusal: 3 * CALLERS_EACH - ROOM}
    await assert_books_balance(postgres_url)


async def test_a_cap_is_not_passed_by_a_billionth(
    postgres_agents: PostgresAgents, postgres_ledger: PostgresLedger
) -> None:
    """A quotient of large amounts is within rounding of a whole number."""
    for amount, cap, room in [
        ("999999999999.999999999", "999999999999.999999998", 0),
        ("999999999999.999999999", "999999999999.999999999", 1),
        ("333333333333.333333333", "999999999999.999999998", 2),
        ("333333333333.333333333", "999999999999.999999999", 3),
        ("0.000000003", "0.000000008", 2),
        ("3", "8.999999999", 2),
    ]:
        agent = make_agent(budget_config={"max_cost_per_invocation": amount, "max_monthly_cost": cap})
        await postgres_agents.create(agent)
        results = await settled_down(*(postgres_ledger.admit(make_request(agent)) for _ in range(5)))
        assert len(admitted(results)) == room, (amount, cap)


async def test_two_that_settle_one_invocation_are_told_what_is_stored(
    postgres_url: str, postgres_agents: PostgresAgents, postgres_engine: AsyncEngine
) -> None:
    """Also when they come in one batch, with different outcomes."""
    [agent] = await stored_agents(postgres_agents, 1, budget_config={"max_cost_per_invocation": 1})
    scene = await watched(postgres_engine)
    reader = PostgresInvocations(postgres_engine)
    for outcomes in permutations([costing("0.25"), refused(), timed_out()]):
        [invocation] = await scene.running(agent)
        answers = await asyncio.gather(*(scene.ledger.settle(conclude(invocation, outcome)) for outcome in outcomes))
        stored = await reader.read(agent.org_id, agent.id, invocation.id)
        assert stored.has_ended
        assert answers == [stored] * 3
    assert scene.sizes.count((0, 3)) == 6
    await assert_books_balance(postgres_url)


async def test_a_namesake_in_another_organisation_is_not_told_that_it_was_settled(
    postgres_agents: PostgresAgents, postgres_engine: AsyncEngine
) -> None:
    one, other = await stored_agents(postgres_agents, 2)
    scene = await watched(postgres_engine)
    [invocation] = await scene.running(one)
    finished = conclude(invocation)
    foreign = attrs.evolve(finished, org_id=other.org_id, external_agent_id=other.id)
    results = await settled_down(scene.ledger.settle(foreign), scene.ledger.settle(finished))
    assert scene.sizes[-1] == (0, 2)
    assert isinstance(results[0], InvocationNotFound)
    assert results[1] == finished


async def test_two_months_wait_together(
    postgres_url: str, postgres_agents: PostgresAgents, postgres_engine: AsyncEngine
) -> None:
    """Each is reserved for in its own month, under the month's own cap; the windows know of no month."""
    agent = make_agent(
        budget_config={"max_cost_per_invocation": 1, "max_monthly_cost": 3},
        rate_limit_config={"requests_per_minute": 100},
    )
    await postgres_agents.create(agent)
    scene = await watched(postgres_engine)
    moments = [LAST_MONTH, THIS_MONTH] * 5
    results = await settled_down(
        *(scene.ledger.admit(make_request(agent, invocation_id=id_at(moment))) for moment in moments)
    )
    assert [admission.invocation.created_at for admission in admitted(results)] == moments[:6]
    assert names(results[6:]) == {BudgetExceeded.__name__}
    assert max(quota.used for admission in admitted(results) for quota in admission.quotas.quotas) == 6
    await assert_books_balance(postgres_url)
    # What was admitted last month is charged to it, whenever it ends.
    both = [admission.invocation for admission in admitted(results)]
    await asyncio.gather(*(scene.ledger.settle(conclude(invocation, costing("0.5"))) for invocation in both))
    await assert_books_balance(postgres_url)
    with psycopg.connect(dsn(postgres_url)) as connection:
        rows = connection.execute("SELECT month, spent, reserved FROM external_agent_budgets ORDER BY month").fetchall()
    assert [(month.month, spent, reserved) for month, spent, reserved in rows] == [
        (1, Decimal("1.5"), 0),
        (2, Decimal("1.5"), 0),
    ]
    assert len(scene.batches) < 6


async def test_places_taken_elsewhere_and_here_share_one_account(
    postgres_url: str, postgres_agents: PostgresAgents, postgres_engine: AsyncEngine
) -> None:
    """Whatever else they are, their reservations together stay under the cap."""
    agent = make_agent(
        budget_config={"max_cost_per_invocation": 1, "max_monthly_cost": 5},
        rate_limit_config={"requests_per_day": 100},
    )
    await postgres_agents.create(agent)
    scene = await watched(postgres_engine)
    outside = RateLimited("hour", 17, RateQuotas())
    verdicts = [PLACE, None, outside] * 6
    results = await settled_down(*(scene.ledger.admit(make_request(agent, verdict=verdict)) for verdict in verdicts))
    assert len(admitted(results)) == 5
    assert names(results[0::3] + results[1::3]) == {"Admission", "BudgetExceeded"}
    assert results[2::3] == [outside] * 6
    await assert_books_balance(postgres_url)


async def test_an_outside_refusal_comes_after_what_stands_before_it(
    postgres_agents: PostgresAgents, postgres_ledger: PostgresLedger
) -> None:
    outside = RateLimited("minute", 3, RateQuotas())
    agent, asleep = make_agent(), make_agent()
    await postgres_agents.bulk([agent, asleep])
    asleep = next_version(asleep, status=AgentStatus.INACTIVE)
    await postgres_agents.update(asleep)
    for request, expected in [
        (make_request(make_agent(), verdict=outside), AgentNotFound),
        (make_request(next_version(agent), verdict=outside), StaleVersion),
        (make_request(asleep, verdict=outside), AgentInactive),
        (make_request(agent, verdict=outside), RateLimited),
    ]:
        with pytest.raises(expected):
            await postgres_ledger.admit(request)


async def test_a_lease_that_is_lost_in_the_middle_costs_nobody_anything(
    postgres_agents: PostgresAgents, open_engine: OpenEngine, shifted_clock: ShiftedClock
) -> None:
    """What is in the batch besides is settled, and the admissions go on under a new lease."""
    engine = open_engine(shifted_clock.url)
    [agent] = await stored_agents(postgres_agents, 1)
    scene = await watched(engine)
    running = await scene.running(agent, 5)
    await shifted_clock.pass_time(LEASE_S + 1)
    results = await settled_down(
        *(scene.ledger.settle(conclude(invocation)) for invocation in running),
        *(scene.ledger.admit(make_request(agent)) for _ in range(20)),
    )
    assert names(results) == {"ExternalAgentInvocation", "Admission"}
    assert scene.sizes[1] == (20, 5)
    assert scene.ledger._instance.in_flight() == 20


async def test_an_agent_without_its_row_of_windows_is_not_unlimited(
    postgres_url: str, postgres_agents: PostgresAgents, postgres_ledger: PostgresLedger
) -> None:
    [agent] = await stored_agents(postgres_agents, 1, rate_limit_config={"requests_per_minute": 1})
    with psycopg.connect(dsn(postgres_url)) as connection:
        connection.execute("DELETE FROM external_agent_rate_windows WHERE agent_id = %s", [agent.id])
    with pytest.raises(AgentNotFound):
        await postgres_ledger.admit(make_request(agent))


async def test_any_organisation_and_any_text_pass(
    postgres_agents: PostgresAgents, postgres_engine: AsyncEngine
) -> None:
    agents = [
        make_agent(org_id=org_id)
        for org_id in (f"a.b:c-d_E{uuid4().hex}", "-", ".", ":", "_", "0", "Z" * 100, "NULL", "null", "a", "A")
    ]
    await postgres_agents.bulk(agents)
    scene = await watched(postgres_engine)
    texts: dict[str, Any] = {
        "initiated_by": "{,\"'\\ü \U0010ffff",
        "lineage_hop_id": "NULL",
        "trace_id": "0" * 31 + "1",
    }
    requests = [make_request(agent, **texts) for agent in agents]
    results = await asyncio.gather(*(scene.ledger.admit(request) for request in requests))
    assert scene.sizes == [(len(agents), 0)]
    reader = PostgresInvocations(postgres_engine)
    for agent, admission in zip(agents, results, strict=True):
        invocation = admission.invocation
        assert (invocation.org_id, invocation.initiated_by) == (agent.org_id, texts["initiated_by"])
        assert await reader.read(agent.org_id, agent.id, invocation.id) == invocation


async def test_locks_are_taken_in_one_order_whatever_the_databases_collation(
    postgres_server: PostgresServer, open_engine: OpenEngine
) -> None:
    """Where `a` stands before `B` too."""
    template = sql.Identifier(f"collated_{uuid4().hex}")
    try:
        postgres_server.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'en-US' LOCALE 'C'").format(
                template
            )
        )
    except psycopg.errors.FeatureNotSupported:
        pytest.skip("this server knows no collation but C")
    try:
        url = postgres_server.url(template.as_string()[1:-1])
        await asyncio.to_thread(migrate, url)
        with psycopg.connect(dsn(url)) as connection:
            assert connection.execute("SELECT 'a' < 'B'").fetchone() == (True,)
        engine = open_engine(url)
        agents = PostgresAgents(engine, key_id_of=lambda envelope: "k1")
        first, second = make_agent(org_id="B"), make_agent(org_id="a")
        await agents.bulk([first, second])
        scene = await watched(engine)
        with held_up(url, first):
            work = asyncio.gather(*(scene.ledger.admit(make_request(agent)) for agent in (second, first)))
            await wait_for_lock(url)
            with held_up(url, second, statement=_NO_WAIT):
                pass
        await work
        await engine.dispose()
    finally:
        postgres_server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(template))


_NO_WAIT = "SELECT FROM external_agent_rate_windows WHERE org_id = %s AND agent_id = %s FOR UPDATE NOWAIT"


async def test_a_snapshot_that_the_database_prefers_is_not_kept(
    postgres_url: str, postgres_agents: PostgresAgents, open_engine: OpenEngine
) -> None:
    """Under REPEATABLE READ what is read behind a lock would be as it was before the wait."""
    [agent] = await stored_agents(postgres_agents, 1)
    with psycopg.connect(dsn(postgres_url), autocommit=True) as connection:
        name = sql.Identifier(connection.info.dbname)
        connection.execute(
            sql.SQL("ALTER DATABASE {} SET default_transaction_isolation = 'repeatable read'").format(name)
        )
    scene = await watched(open_engine(postgres_url))
    with held_up(postgres_url, agent) as connection:
        connection.execute("UPDATE external_agents SET version = 2 WHERE id = %s", [agent.id])
        admission = asyncio.create_task(scene.ledger.admit(make_request(agent)))
        await wait_for_lock(postgres_url)
    with pytest.raises(StaleVersion):
        await admission


async def test_a_role_that_may_use_the_tables_may_use_the_function(
    postgres_server: PostgresServer, postgres_url: str, postgres_agents: PostgresAgents, open_engine: OpenEngine
) -> None:
    """It does what its caller may do; nobody gains by calling it."""
    [agent] = await stored_agents(postgres_agents, 1)
    role = sql.Identifier(f"user_{uuid4().hex}")
    url = postgres_url.replace("external_agents@", f"{role.as_string()[1:-1]}@")
    postgres_server.execute(sql.SQL("CREATE ROLE {} LOGIN").format(role))
    try:
        with psycopg.connect(dsn(postgres_url), autocommit=True) as owner:
            ledger = PostgresLedger(open_engine(url), uuid4())
            owner.execute(sql.SQL("GRANT SELECT, INSERT, UPDATE, DELETE ON instances TO {}").format(role))
            with pytest.raises(Unavailable, match="rights"):
                await ledger.admit(make_request(agent))
            owner.execute(
                sql.SQL("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {}").format(role)
            )
            admission = await ledger.admit(make_request(agent))
            await ledger.settle(conclude(admission.invocation))
            owner.execute(sql.SQL("DROP OWNED BY {}").format(role))
    finally:
        await asyncio.sleep(0)
        postgres_server.execute(sql.SQL("DROP ROLE {}").format(role))


async def test_an_observer_who_fails_disturbs_nobody(
    postgres_agents: PostgresAgents, postgres_engine: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    [agent] = await stored_agents(postgres_agents, 1)

    def observe(record: BatchRecord) -> None:
        raise RuntimeError("observer")

    ledger = PostgresLedger(postgres_engine, uuid4(), observe=observe)
    await ledger.heartbeat()
    with caplog.at_level(logging.ERROR):
        results = await asyncio.gather(*(ledger.admit(make_request(agent)) for _ in range(300)))
    assert len(admitted([*results])) == 300
    assert "observer" in caplog.text


_caller: ContextVar[str] = ContextVar("caller", default="nobody")


async def test_batches_are_carried_in_no_callers_context(
    postgres_agents: PostgresAgents, postgres_engine: AsyncEngine
) -> None:
    """Its trace and its tenant would be said of everybody's batches."""
    [agent] = await stored_agents(postgres_agents, 1)
    seen: set[str] = set()
    ledger = PostgresLedger(postgres_engine, uuid4(), observe=lambda record: seen.add(_caller.get()))
    token = _caller.set("tenant")
    await asyncio.gather(*(ledger.admit(make_request(agent)) for _ in range(3)))
    _caller.reset(token)
    assert seen == {"nobody"}


async def test_a_settlement_under_another_agents_name_is_refused(
    postgres_url: str, postgres_agents: PostgresAgents, postgres_engine: AsyncEngine
) -> None:
    """It would be booked to an account that its reservation is not on."""
    org_id = new_org()
    one, other = await stored_agents(
        postgres_agents, 2, org_id=org_id, budget_config={"max_cost_per_invocation": 1, "max_monthly_cost": 100}
    )
    scene = await watched(postgres_engine)
    mistaken, *running = await scene.running(one, 10)
    in_yen = conclude(mistaken, costing("0.5"), currency="JPY")
    elsewhere = attrs.evolve(in_yen, external_agent_id=other.id)
    foreign_month = attrs.evolve(in_yen, created_at=LAST_MONTH)
    results = await settled_down(
        *(scene.ledger.settle(conclude(invocation)) for invocation in running),
        scene.ledger.settle(elsewhere),
        scene.ledger.settle(foreign_month),
        *(scene.ledger.admit(make_request(agent)) for agent in (one, other)),
    )
    assert names(results[:9]) == {"ExternalAgentInvocation"}
    assert not any(isinstance(result, psycopg.Error) for result in results[:9] + results[11:])
    assert names(results[9:11]) == {"RaiseException"}
    assert len(admitted(results)) == 2
    stored = await PostgresInvocations(postgres_engine).read(org_id, one.id, mistaken.id)
    assert stored.status is InvocationStatus.RUNNING
    await scene.ledger.settle(conclude(mistaken))
    await assert_books_balance(postgres_url)


async def test_an_unknown_invocation_cannot_be_settled(
    postgres_agents: PostgresAgents, postgres_engine: AsyncEngine
) -> None:
    [agent] = await stored_agents(postgres_agents, 1, budget_config={"max_cost_per_invocation": 1})
    scene = await watched(postgres_engine)
    [invocation] = await scene.running(agent)
    results = await settled_down(
        scene.ledger.settle(conclude(attrs.evolve(invocation, id=new_id()))),
        scene.ledger.settle(conclude(attrs.evolve(invocation, org_id=new_org()))),
        scene.ledger.settle(conclude(attrs.evolve(invocation, external_agent_id=new_id(), reservation=None))),
    )
    assert [type(result) for result in results[:2]] == [InvocationNotFound] * 2
