"""The ledger on a real PostgreSQL: races between processes, lost answers, hostile values."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from decimal import Decimal
from itertools import count
from pathlib import Path
from uuid import UUID, uuid4

import attrs
import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from between import Proxy
from books import assert_books_balance
from external_agents.adapters.postgres.agents import PostgresAgents
from external_agents.adapters.postgres.invocations import PostgresInvocations
from external_agents.adapters.postgres.ledger import PostgresLedger
from external_agents.domain.budget import BudgetAccount
from external_agents.domain.errors import AdmissionInDoubt, InvocationNotFound, StaleVersion, Unavailable
from external_agents.domain.invocation import ErrorCode, InvocationStatus
from external_agents.domain.json_values import JsonText
from external_agents.domain.refusals import AdmissionRefused
from external_agents.ports.ledger import LEASE_S, Admission
from external_agents.ports.repositories import InvocationQuery
from external_agents.testing.builders import (
    conclude,
    costing,
    make_agent,
    make_finished_call,
    make_request,
    new_id,
    new_org,
    next_version,
    refused,
    timed_out,
)
from postgres_server import LOCK_AGENT, OpenEngine, ShiftedClock, dsn, wait_for_lock

ROOM = 7
CALLERS_EACH = 25

# Another process: so many callers at once, and what became of each.
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
    ledger = PostgresLedger(engine, uuid4())
    await ledger.heartbeat()
    print("ready", flush=True)
    sys.stdin.readline()
    requests = [ledger.admit(make_request(agent)) for _ in range(int(callers))]
    results = await asyncio.gather(*requests, return_exceptions=True)
    print(json.dumps([type(result).__name__ for result in results]), flush=True)
    await engine.dispose()

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("limits", "refusal"),
    [
        ({"rate_limit_config": {"requests_per_hour": ROOM}}, "RateLimited"),
        ({"budget_config": {"max_cost_per_invocation": "0.1", "max_monthly_cost": "0.7"}}, "BudgetExceeded"),
    ],
)
async def test_room_for_some_admits_exactly_some_over_processes(
    postgres_url: str,
    postgres_agents: PostgresAgents,
    postgres_ledger: PostgresLedger,
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
    mine = asyncio.gather(
        *(postgres_ledger.admit(make_request(agent)) for _ in range(CALLERS_EACH)), return_exceptions=True
    )
    answers = [(await rival.communicate(b"go\n"))[0] for rival in rivals]
    outcomes = Counter(type(result).__name__ for result in await mine)
    for answer in answers:
        outcomes += Counter(json.loads(answer))
    assert outcomes == {"Admission": ROOM, refusal: 3 * CALLERS_EACH - ROOM}


async def test_mixed_work_neither_deadlocks_nor_loses_money(
    postgres_url: str, postgres_agents: PostgresAgents, open_engine: OpenEngine, shifted_clock: ShiftedClock
) -> None:
    """Admissions, settlements, recoveries and changes of agents, over two currencies each; then the books are read."""
    engine = open_engine(shifted_clock.url)
    org_id = new_org()
    agents = [
        make_agent(org_id=org_id, budget_config={"max_cost_per_invocation": "0.1", "currency": currency})
        for currency in ("EUR", "USD", "CHF")
    ]
    await postgres_agents.bulk(agents)
    ledgers = [PostgresLedger(engine, uuid4()) for _ in range(3)]
    outcomes = [costing(None), costing("0.05"), costing("0.4"), refused(), timed_out()]
    finished = asyncio.Event()

    async def caller(number: int) -> None:
        for turn in range(8):
            agent = await postgres_agents.read(org_id, agents[(number + turn) % len(agents)].id)
            ledger = ledgers[number % len(ledgers)]
            try:
                invocation = (await ledger.admit(make_request(agent))).invocation
            except (StaleVersion, Unavailable):  # The agent was changed; leases run out faster than they are renewed.
                continue
            if (number + turn) % 4:
                outcome = outcomes[(number + turn) % len(outcomes)]
                await ledger.settle(
                    conclude(invocation, outcome, currency="JPY" if turn % 2 else agent.budget.currency)
                )

    async def editor() -> None:
        for turn in count():
            if finished.is_set():
                return
            for known in agents:
                agent = await postgres_agents.read(org_id, known.id)
                currency = ("EUR", "USD", "CHF", "SEK")[turn % 4]
                changed = next_version(agent, budget_config={"max_cost_per_invocation": "0.2", "currency": currency})
                await postgres_agents.update(changed)
            await asyncio.sleep(0.01)

    async def undertaker() -> None:
        judge = PostgresLedger(engine, uuid4())
        while not finished.is_set():
            await shifted_clock.pass_time(LEASE_S / 3)
            await judge.heartbeat()
            await judge.recover()

    background = asyncio.gather(editor(), undertaker(), undertaker(), return_exceptions=True)
    callers = await asyncio.gather(*(caller(number) for number in range(24)), return_exceptions=True)
    finished.set()
    assert set(callers) == {None}
    assert set(await background) == {None}
    with psycopg.connect(dsn(postgres_url)) as connection:
        assert connection.execute(
            "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        ).fetchone() == (0,)
    await assert_books_balance(postgres_url)


async def test_a_busy_agent_can_be_changed(
    postgres_agents: PostgresAgents, postgres_ledger: PostgresLedger, postgres_engine: AsyncEngine
) -> None:
    agent = make_agent()
    await postgres_agents.create(agent)

    async def caller() -> int:
        for admitted in count():
            try:
                await postgres_ledger.admit(make_request(agent))
            except StaleVersion:
                return admitted
        raise AssertionError

    callers = [asyncio.create_task(caller()) for _ in range(8)]
    await asyncio.sleep(0)
    changed = next_version(agent, name="changed")
    await postgres_agents.update(changed)
    admitted = await asyncio.gather(*callers)
    query = InvocationQuery(org_id=agent.org_id)
    assert await PostgresInvocations(postgres_engine).count(query) == sum(admitted)


async def test_an_admission_sees_the_change_that_it_waited_for(
    postgres_url: str, postgres_agents: PostgresAgents, postgres_ledger: PostgresLedger
) -> None:
    agent = make_agent()
    await postgres_agents.create(agent)
    with psycopg.connect(dsn(postgres_url)) as connection:
        connection.execute(LOCK_AGENT, [agent.org_id, agent.id])
        connection.execute("UPDATE external_agents SET version = 2 WHERE id = %s", [agent.id])
        admission = asyncio.create_task(postgres_ledger.admit(make_request(agent)))
        await wait_for_lock(postgres_url)
    with pytest.raises(StaleVersion):
        await admission


async def test_a_change_waits_for_the_admission_that_does_not_know_it(
    postgres_url: str, postgres_agents: PostgresAgents, postgres_ledger: PostgresLedger
) -> None:
    """So that nothing is admitted under a version after another one was acknowledged."""
    agent = make_agent(budget_config={"max_cost_per_invocation": 1})
    await postgres_agents.create(agent)
    await postgres_ledger.admit(make_request(agent))
    with psycopg.connect(dsn(postgres_url)) as connection:
        connection.execute("SELECT FROM external_agent_budgets FOR UPDATE")
        admission = asyncio.create_task(postgres_ledger.admit(make_request(agent)))
        await wait_for_lock(postgres_url)
        change = asyncio.create_task(postgres_agents.update(next_version(agent)))
        both_wait = asyncio.create_task(wait_for_lock(postgres_url, 2))
        done, _ = await asyncio.wait({change, both_wait}, return_when=asyncio.FIRST_COMPLETED)
        both_wait.cancel()
    await admission
    await change
    assert done == {both_wait}


async def test_accounts_are_locked_in_one_order(
    postgres_url: str, postgres_agents: PostgresAgents, postgres_ledger: PostgresLedger
) -> None:
    """Two settlements over the same two accounts, each charged where the other releases."""
    agent = make_agent(budget_config={"max_cost_per_invocation": 1, "currency": "EUR"})
    await postgres_agents.create(agent)
    euros = (await postgres_ledger.admit(make_request(agent))).invocation
    agent = next_version(agent, budget_config={"max_cost_per_invocation": 1, "currency": "JPY"})
    await postgres_agents.update(agent)
    yen = (await postgres_ledger.admit(make_request(agent))).invocation
    with psycopg.connect(dsn(postgres_url)) as connection:
        connection.execute("SELECT FROM external_agent_budgets WHERE currency = 'JPY' FOR UPDATE")
        first = asyncio.create_task(postgres_ledger.settle(conclude(euros, costing("0.5"), currency="JPY")))
        await wait_for_lock(postgres_url)
        second = asyncio.create_task(postgres_ledger.settle(conclude(yen, costing("0.5"), currency="EUR")))
        await wait_for_lock(postgres_url, 2)
    await asyncio.gather(first, second)
    await assert_books_balance(postgres_url)


async def test_the_clock_is_read_behind_the_locks(
    postgres_url: str, postgres_agents: PostgresAgents, postgres_ledger: PostgresLedger
) -> None:
    """now() would be the moment before the wait."""
    agent = make_agent(rate_limit_config={"requests_per_minute": 5})
    await postgres_agents.create(agent)
    with psycopg.connect(dsn(postgres_url)) as connection:
        connection.execute(LOCK_AGENT, [agent.org_id, agent.id])
        admission = asyncio.create_task(postgres_ledger.admit(make_request(agent)))
        await wait_for_lock(postgres_url)
        await asyncio.sleep(2.5)  # Two buckets of a minute's window.
        row = connection.execute("SELECT extract(epoch FROM clock_timestamp())").fetchone()
    assert row is not None
    await admission
    with psycopg.connect(dsn(postgres_url)) as connection:
        head = connection.execute("SELECT minute_head FROM external_agent_rate_windows").fetchone()
    assert head is not None
    assert head[0] >= int(row[0] / Decimal("1.2"))


async def test_an_admission_whose_commit_was_not_answered_is_ended(
    postgres_url: str,
    postgres_agents: PostgresAgents,
    postgres_engine: AsyncEngine,
    open_engine: OpenEngine,
    tmp_path: Path,
) -> None:
    """The process lives on, so no lease runs out; but nobody will carry the invocation out."""
    agent = make_agent(budget_config={"max_cost_per_invocation": 1})
    await postgres_agents.create(agent)
    async with Proxy.to(postgres_url, tmp_path) as proxy:
        ledger = PostgresLedger(open_engine(proxy.url), uuid4())
        kept = (await ledger.admit(make_request(agent))).invocation
        request = make_request(agent)
        proxy.losing = request.invocation_id.bytes
        with pytest.raises(AdmissionInDoubt):
            await ledger.admit(request)
        proxy.losing = None
        reader = PostgresInvocations(postgres_engine)
        assert (await reader.read(agent.org_id, agent.id, request.invocation_id)).status is InvocationStatus.RUNNING
        assert await ledger.recover() == 1
        assert await ledger.recover() == 0
        ended = await reader.read(agent.org_id, agent.id, request.invocation_id)
        assert (ended.status, ended.error_code) == (InvocationStatus.UNKNOWN, ErrorCode.INTERRUPTED)
        account = (await ledger.forecast(agent.org_id, agent.id)).account
        assert account == BudgetAccount(spent=Decimal(1), reserved=Decimal(1))
        await ledger.settle(conclude(kept))
    await assert_books_balance(postgres_url)


async def test_callers_who_go_away_leave_nothing_behind(
    postgres_url: str, postgres_agents: PostgresAgents, open_engine: OpenEngine
) -> None:
    """Cancelled anywhere, also within the commit: no connection is lost, and what nobody was told of is ended."""
    agent = make_agent(budget_config={"max_cost_per_invocation": 1})
    await postgres_agents.create(agent)
    engine = open_engine(postgres_url, pool_size=3, pool_wait_s=30.0)
    ledger, reader = PostgresLedger(engine, uuid4()), PostgresInvocations(engine)
    known: set[UUID] = set()
    for turn in range(40):
        callers = [asyncio.create_task(ledger.admit(make_request(agent))) for _ in range(5)]
        await asyncio.wait(callers, timeout=turn / 1000, return_when=asyncio.FIRST_COMPLETED)
        for caller in callers:
            caller.cancel()
        results = await asyncio.gather(*callers, return_exceptions=True)
        known |= {result.invocation.id for result in results if isinstance(result, Admission)}
    await ledger.recover()
    running = InvocationQuery(org_id=agent.org_id, status=InvocationStatus.RUNNING)
    assert {row.id for row in await reader.list(running, limit=1000)} == known
    assert (await ledger.forecast(agent.org_id, agent.id)).account.reserved == len(known)
    await assert_books_balance(postgres_url)
    await asyncio.gather(*(ledger.admit(make_request(agent)) for _ in range(6)))


async def test_refusals_are_not_remembered(postgres_agents: PostgresAgents, postgres_ledger: PostgresLedger) -> None:
    """What a process has in flight must not grow with what it refuses."""
    agent = make_agent(rate_limit_config={"requests_per_day": 0})
    await postgres_agents.create(agent)
    for _ in range(5):
        with pytest.raises(AdmissionRefused):
            await postgres_ledger.admit(make_request(agent))
    assert not postgres_ledger._instance._in_flight
    assert not postgres_ledger._recovery._doubtful


async def test_what_json_allows_is_kept_to_the_letter(
    postgres_agents: PostgresAgents, postgres_ledger: PostgresLedger, postgres_engine: AsyncEngine
) -> None:
    agent = make_agent()
    await postgres_agents.create(agent)
    texts = [
        "123456789012345678901234567890.10",
        "-0",
        "1E400",
        "1" * 5000,
        r'"\u0000"',
        r'{"\u0000": "\ud800", "a": "\udc00\ud800"}',
        '{"b": 1, "a": 2, "b": 3}',
        " [ 1 ,\n\t2 ] ",
        '"\u2028 %s :name ? \\\\ $1"',
        "[" * 512 + "]" * 512,
        "null",
    ]
    for text in texts:
        request = make_request(agent, request=JsonText.parse(text.encode()))
        invocation = (await postgres_ledger.admit(request)).invocation
        settled = conclude(invocation, response=JsonText(text))
        assert await postgres_ledger.settle(settled) == settled
        assert await PostgresInvocations(postgres_engine).read(agent.org_id, agent.id, invocation.id) == settled


async def test_text_that_cannot_be_stored_does_not_keep_an_invocation_from_ending(
    postgres_agents: PostgresAgents, postgres_ledger: PostgresLedger, postgres_engine: AsyncEngine
) -> None:
    agent = make_agent()
    await postgres_agents.create(agent)
    invocation = (await postgres_ledger.admit(make_request(agent, lineage_hop_id="hop\0\ud800"))).invocation
    stored = await postgres_ledger.settle(conclude(invocation, error_message="bad \0 and \udcff"))
    assert stored.error_message == "bad \ufffd and ?"
    read = await PostgresInvocations(postgres_engine).read(agent.org_id, agent.id, invocation.id)
    assert read == attrs.evolve(stored, lineage_hop_id="hop\ufffd?")


async def test_an_invocation_of_another_organisation_is_not_settled(
    postgres_agents: PostgresAgents, postgres_ledger: PostgresLedger, postgres_engine: AsyncEngine
) -> None:
    agent = make_agent(budget_config={"max_cost_per_invocation": 1})
    await postgres_agents.create(agent)
    invocation = (await postgres_ledger.admit(make_request(agent))).invocation
    with pytest.raises(InvocationNotFound):
        await postgres_ledger.settle(conclude(attrs.evolve(invocation, org_id=new_org())))
    with pytest.raises(InvocationNotFound):
        await postgres_ledger.settle(conclude(attrs.evolve(invocation, id=new_id())))
    assert await PostgresInvocations(postgres_engine).read(agent.org_id, agent.id, invocation.id) == invocation


async def test_a_record_is_created_in_its_ids_millisecond(
    postgres_agents: PostgresAgents, postgres_ledger: PostgresLedger, postgres_engine: AsyncEngine
) -> None:
    """Times are looked for as bounds of ids."""
    agent = make_agent()
    await postgres_agents.create(agent)
    call = make_finished_call(agent)
    await postgres_ledger.record(attrs.evolve(call, created_at=call.created_at.replace(year=2020)))
    assert await PostgresInvocations(postgres_engine).read(agent.org_id, agent.id, call.id) == call
