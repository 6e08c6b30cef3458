"""A run, in order: build, disturb, wait for recovery, compare."""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

import attrs
import psycopg

from chaos import server as app
from chaos.checks import CHECKS, CLAIMS, Named, covered
from chaos.controls import DATABASE, FORGETFUL_REDIS, LAZY_COMMIT
from chaos.events import Demon
from chaos.evidence import Evidence, arrivals_of, instances_of, running_instances, tables_of, unfinished
from chaos.load import Callers, register, until_ready
from chaos.machines import AgentProcess, ApiServer, Census, Database, Redis, to_the_end
from chaos.plan import ORGANISATIONS, Options, Plan
from external_agents.adapters.identity import ApiKeys
from external_agents.adapters.memory.system import SystemClock, SystemIds
from external_agents.adapters.postgres.api_keys import PostgresApiKeys
from external_agents.adapters.postgres.embedded import owned
from external_agents.adapters.postgres.engine import create_engine
from external_agents.adapters.postgres.schema import migrate
from external_agents.adapters.secrets import KeyRing

READY_S = 90.0
RECOVERED_WITHIN_S = 120.0
"""As the contract promises."""
PROGRESS_S = 10.0
LOOK_S = 0.5
SLACK = 3
"""So many times its length a run may take to reach its invocations."""
DURABLE = {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on"}

Tell = Callable[[str], None]


@attrs.frozen(kw_only=True)
class Report:
    """
    Attributes:
        faults: By check; an empty list is a promise that held.
        uncovered: What the run should have met and did not.
        events: How many of each kind.
        late: Attempts that processes began after they had been stopped past their lease, the invocation being `unknown`
            already. Not recovery's doing, and worth knowing.
    """

    options: Options
    invocations: int
    statuses: Mapping[str, int]
    answers: Mapping[str, int]
    faults: Mapping[str, list[str]]
    uncovered: list[str]
    events: Mapping[str, int]
    late: int

    @property
    def claim(self) -> str:
        happened = {"kills": "kill", "database crashes": "database", "pauses": "pause"}
        counts = ", ".join(f"{self.events.get(kind, 0)} {name}" for name, kind in happened.items())
        found = ", ".join(f"{self.count(claim)} {claim}" for claim in CLAIMS)
        return f"{self.invocations} invocations, {counts}: {found}"

    def count(self, claim: str) -> int:
        return sum(len(self.faults[named.name]) for named in CHECKS if named.claim == claim)

    @property
    def held(self) -> bool:
        return not any(self.faults.values()) and not self.uncovered


async def run(options: Options, folder: Path, tell: Tell) -> Report:
    """On return, however it ends, no process of it is left."""
    plan = Plan(options)
    with ExitStack() as stack:
        log = stack.enter_context((folder / "log").open("ab"))
        postgres = stack.enter_context(owned(folder / "home"))
        migrate(postgres.url)
        database = Database(postgres)
        await _require_durable(database.dsn)
        secret_keys = f"k1:{base64.b64encode(secrets.token_bytes(32)).decode()}"
        keys = await _issue_keys(postgres.url, secret_keys)
        agent = AgentProcess(folder / "journal", database.dsn, log.fileno())
        stack.callback(agent.stop)
        redis = None
        if options.redis_crashes:
            (folder / "redis").mkdir()
            redis = Redis(folder / "redis", log.fileno(), durable=options.control != FORGETFUL_REDIS)
            stack.callback(redis.stop)
        settings = _settings(options, folder, postgres.url, secret_keys, redis)
        servers = []
        for number in range(options.servers):
            servers.append(ApiServer(number, options.workers, settings, log.fileno()))
            stack.callback(servers[-1].kill)
        census = Census(servers)
        addresses = [server.address for server in servers]
        await until_ready(addresses, census, options.servers * options.workers, READY_S)
        agent_ids = await register(plan, addresses[0], keys, agent.url)
        tell(f"{len(agent_ids)} agents; the load begins")
        callers = Callers(plan, addresses, keys, agent_ids)

        async def busy() -> set[int]:
            process_of = instances_of(folder / "instances")
            return {process_of[instance] for instance in await running_instances(database.dsn)}

        demon = Demon(options.seed, census, database, redis, busy, tell)
        await _disturb(plan, callers, demon, census, tell)
        await _await_recovery(database.dsn, tell)
        census.look()
        workers = dict(census.workers)
        tell("stopping the servers in good order")
        for server in servers:
            await to_the_end(server.stop)
        await to_the_end(agent.stop)
        rows, accounts = await tables_of(database.dsn)
        evidence = Evidence(
            agents={agent_ids[planned.org, planned.name]: planned for planned in plan.agents},
            answers=callers.answers,
            edits=callers.edits,
            arrivals=arrivals_of(folder / "journal"),
            rows=rows,
            accounts=accounts,
            workers=workers,
            process_of=instances_of(folder / "instances"),
        )
    return _report(options, evidence, demon)


async def _disturb(plan: Plan, callers: Callers, demon: Demon, census: Census, tell: Tell) -> None:
    options, over, began_s = plan.options, asyncio.Event(), time.monotonic()
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(census.watch())
        calling = group.create_task(callers.call_until(over))
        killing = group.create_task(demon.carry_out(plan.events))
        told_s = began_s
        while not (elapsed_s := time.monotonic() - began_s) > SLACK * options.duration_s:
            if killing.done() and elapsed_s >= options.duration_s and callers.admitted >= options.invocations:
                break
            if time.monotonic() - told_s >= PROGRESS_S:
                told_s = time.monotonic()
                tell(f"{len(callers.answers)} answers, {callers.admitted} of them of new invocations")
            await asyncio.sleep(LOOK_S)
        await killing
        over.set()
        tell("the load ends")
        await calling
        watching.cancel()


async def _await_recovery(dsn: str, tell: Tell) -> None:
    tell("waiting until nothing is running")
    deadline = time.monotonic() + RECOVERED_WITHIN_S
    while left := await unfinished(dsn):
        if time.monotonic() > deadline:
            tell(f"{left} invocations are still running after {RECOVERED_WITHIN_S:.0f} s")
            return
        await asyncio.sleep(LOOK_S)


async def _require_durable(dsn: str) -> None:
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        for name, wanted in DURABLE.items():
            [found] = await (await connection.execute(f"SHOW {name}".encode())).fetchone() or [None]
            if found != wanted:
                raise RuntimeError(f"The database has {name} {found}: this would prove nothing.")


async def _issue_keys(url: str, secret_keys: str) -> dict[str, str]:
    engine = create_engine(url)
    try:
        keys = ApiKeys(
            store=PostgresApiKeys(engine), key_ring=KeyRing.parse(secret_keys), clock=SystemClock(), ids=SystemIds()
        )
        return {org: (await keys.issue(org, "chaos"))[0] for org in ORGANISATIONS}
    finally:
        await engine.dispose()


def _settings(options: Options, folder: Path, url: str, secret_keys: str, redis: Redis | None) -> dict[str, str]:
    instances = folder / "instances"
    instances.mkdir()
    lazy = f"&options={quote('-c synchronous_commit=off')}" if options.control == LAZY_COMMIT else ""
    return {
        "EXTERNAL_AGENTS_DATABASE_URL": url + lazy,
        "EXTERNAL_AGENTS_SECRET_KEYS": secret_keys,
        "EXTERNAL_AGENTS_EGRESS_ALLOW": "loopback",
        "EXTERNAL_AGENTS_LOG_FORMAT": "json",
        "EXTERNAL_AGENTS_LOG_LEVEL": "warning",
        **({} if redis is None else {"EXTERNAL_AGENTS_REDIS_URL": redis.url}),
        app.LEASE_S: str(options.lease_s),
        app.HEARTBEAT_S: str(options.heartbeat_s),
        app.INSTANCES: str(instances),
        app.CONTROL: options.control or "",
        DATABASE: url.replace("+psycopg", ""),
    }


def _report(options: Options, evidence: Evidence, demon: Demon) -> Report:
    def faults(named: Named) -> list[str]:
        return list(named.check(evidence))

    rows = evidence.rows.values()
    return Report(
        options=options,
        invocations=len(rows),
        statuses=Counter(row.status for row in rows),
        answers=Counter(str(answer.status or "none") for answer in evidence.answers),
        faults={named.name: faults(named) for named in CHECKS},
        uncovered=list(covered(evidence, demon.done)),
        events=demon.done,
        late=sum(
            1
            for row in rows
            for attempt in row.attempts
            if row.status == "unknown" and row.completed_at and datetime.fromisoformat(attempt["at"]) > row.completed_at
        ),
    )
