"""Two roles: what the lesser one reaches past the service, and that the service works with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any, LiteralString
from urllib.parse import quote
from uuid import UUID, uuid4

import attrs
import psycopg
import pytest
from psycopg import sql
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.postgres.agents import PostgresAgents
from external_agents.adapters.postgres.api_keys import PostgresApiKeys
from external_agents.adapters.postgres.engine import create_engine, reading, reading_of, transaction
from external_agents.adapters.postgres.envelopes import PostgresEnvelopes
from external_agents.adapters.postgres.idempotency import clear_expired
from external_agents.adapters.postgres.invocations import PostgresInvocations
from external_agents.adapters.postgres.ledger import PostgresLedger
from external_agents.adapters.postgres.partitions import add_missing_partitions, keep_partitions
from external_agents.adapters.postgres.roles import RIGHTS, TENANTS
from external_agents.adapters.postgres.schema import migrate, role_fault
from external_agents.domain.access import Principal
from external_agents.domain.agent import ExternalAgent
from external_agents.domain.errors import ConfigurationError, Unavailable
from external_agents.domain.invocation import InvocationStatus
from external_agents.ports.identity import ApiKey
from external_agents.ports.ledger import HEARTBEAT_S, LEASE_S
from external_agents.ports.repositories import AgentQuery, InvocationQuery
from external_agents.testing.builders import conclude, make_agent, make_finished_call, make_request
from grouped import until, watched
from postgres_server import PostgresServer, ShiftedClock, as_role, dsn

ACME, OTHER = "acme", "other"
YEAR_END = datetime(2031, 11, 15, tzinfo=UTC)
BOUGHT = {"max_cost_per_invocation": 1}
TABLES = [table.name for table in TENANTS]
FILLED = [table.name for table in TENANTS if table in RIGHTS]


@pytest.fixture(scope="module")
def role(postgres_server: PostgresServer) -> Iterator[str]:
    with postgres_server.role() as name:
        yield name


@pytest.fixture
def owner_url(postgres_url: str, role: str) -> str:
    migrate(postgres_url, role)
    return postgres_url


@pytest.fixture
async def engine(owner_url: str, role: str) -> AsyncIterator[AsyncEngine]:
    engine = create_engine(as_role(owner_url, role), row_security=True)
    yield engine
    await engine.dispose()


@pytest.fixture
def agents(engine: AsyncEngine) -> PostgresAgents:
    return PostgresAgents(engine, key_id_of=lambda envelope: "k1")


def api_key(org_id: str) -> ApiKey:
    return ApiKey(
        id=uuid4(),
        principal=Principal(org_id, "s", ()),
        hash_key_id="k1",
        secret_hash=b"hash",
        created_at=datetime.now(UTC),
        expires_at=None,
        revoked_at=None,
    )


async def furnish(engine: AsyncEngine) -> None:
    """Rows of two organisations in every table that is used, running and ended ones."""
    agents = PostgresAgents(engine, key_id_of=lambda envelope: "k1")
    ledger = PostgresLedger(engine, uuid4())
    for org_id in (ACME, OTHER):
        agent = make_agent(org_id=org_id, budget_config=BOUGHT, sealed={"auth_config.key": b"sealed"})
        await agents.create(agent)
        first = (await ledger.admit(make_request(agent, idempotency_key="key"))).invocation
        await ledger.settle(conclude(first))
        await ledger.admit(make_request(agent))
        await PostgresApiKeys(engine).add(api_key(org_id))
    pool: Any = engine.pool
    await until(lambda: pool.checkedout() == 0)  # Group commit holds its connection for a moment longer.


class Hostile:
    """A session of the lesser role's own, and what the owner sees."""

    def __init__(self, owner_url: str, role: str) -> None:
        self.session = psycopg.connect(dsn(as_role(owner_url, role)), autocommit=True)
        self.owner = psycopg.connect(dsn(owner_url), autocommit=True)

    def ask(self, statement: LiteralString | sql.Composed, *values: object) -> list[Any]:
        return self.session.execute(statement, values).fetchall()

    def on(self, statement: LiteralString, table: str) -> sql.Composed:
        return sql.SQL(statement).format(sql.Identifier(table))

    def everything(self) -> dict[str, list[Any]]:
        """All rows of all organisations."""
        return {
            name: self.owner.execute(self.on("SELECT {0}::text FROM {0} ORDER BY 1", name)).fetchall()
            for name in [*TABLES, "instances"]
        }

    def partitions(self) -> list[str]:
        found = self.owner.execute("SELECT relname FROM pg_class WHERE relispartition AND relkind = 'r'").fetchall()
        return [name for (name,) in found]


@pytest.fixture
async def hostile(owner_url: str, role: str, engine: AsyncEngine) -> AsyncIterator[Hostile]:
    await furnish(engine)
    hostile = Hostile(owner_url, role)
    yield hostile
    hostile.session.close()
    hostile.owner.close()


class TestAHostileSession:
    @pytest.mark.parametrize("setting", [None, "", ",", "acm", "nobody", "ACME", "%", "{acme,other}", "acme other"])
    def test_without_its_setting_there_is_nothing(self, hostile: Hostile, setting: str | None) -> None:
        if setting is not None:
            hostile.ask("SELECT set_config('app.org_ids', %s, false)", setting)
        for table in FILLED:
            assert hostile.everything()[table]
            assert hostile.ask(hostile.on("SELECT * FROM {}", table)) == []
            assert hostile.ask(hostile.on("SELECT count(*) FROM {}", table)) == [(0,)]

    def test_with_one_organisations_setting_there_is_that_one(self, hostile: Hostile) -> None:
        hostile.ask("SELECT set_config('app.org_ids', 'acme', false)")
        for table in FILLED:
            assert hostile.ask(hostile.on("SELECT DISTINCT org_id FROM {}", table)) == [(ACME,)]

    @pytest.mark.parametrize("setting", ["", ACME])
    def test_it_changes_nothing_of_the_other(self, hostile: Hostile, setting: str) -> None:
        hostile.ask("SELECT set_config('app.org_ids', %s, false)", setting)
        before = hostile.everything()
        tried: list[LiteralString] = [
            "UPDATE {} SET org_id = org_id WHERE org_id = 'other'",
            "UPDATE {} SET org_id = 'acme' WHERE org_id = 'other'",
            "DELETE FROM {} WHERE org_id = 'other'",
            "INSERT INTO {0} SELECT * FROM {0} WHERE org_id = 'other' ON CONFLICT DO NOTHING",
            "TRUNCATE {} CASCADE",
            "ALTER TABLE {} DISABLE ROW LEVEL SECURITY",
            "DROP POLICY of_these_organisations ON {}",
            "CREATE POLICY mine ON {} USING (true)",
            "ALTER TABLE {} OWNER TO current_user",
            "SELECT * FROM {} WHERE org_id = 'other' FOR UPDATE",
        ]
        for table in TABLES:
            for statement in tried:
                done = _tried(hostile.session, hostile.on(statement, table))
                assert not done, (table, statement)
        assert hostile.everything() == before

    def test_what_it_adds_or_moves_to_another_is_refused(self, hostile: Hostile) -> None:
        hostile.ask("SELECT set_config('app.org_ids', 'acme', false)")
        before = hostile.everything()
        for table in FILLED:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                hostile.session.execute(hostile.on("UPDATE {} SET org_id = 'other'", table))
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
            hostile.session.execute(
                "INSERT INTO api_keys SELECT gen_random_uuid(), 'other', subject, permissions, attributes, hash_key_id,"
                " secret_hash, created_at FROM api_keys"
            )
        assert hostile.everything() == before

    def test_partitions_are_closed_by_name(self, hostile: Hostile) -> None:
        hostile.ask("SELECT set_config('app.org_ids', 'acme,other', false)")
        partitions = hostile.partitions()
        assert len(partitions) >= 6
        for name in partitions:
            for statement in ("SELECT * FROM {}", "DELETE FROM {}", "COPY {} TO STDOUT", "TRUNCATE {}"):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    hostile.session.execute(hostile.on(statement, name))

    def test_a_right_on_a_partition_given_by_mistake_shows_nothing(self, hostile: Hostile, role: str) -> None:
        for name in hostile.partitions():
            hostile.owner.execute(sql.SQL("GRANT ALL ON {} TO {}").format(sql.Identifier(name), sql.Identifier(role)))
            assert hostile.ask(hostile.on("SELECT * FROM {}", name)) == []

    def test_copy(self, hostile: Hostile) -> None:
        hostile.ask("SELECT set_config('app.org_ids', 'acme', false)")
        for table in FILLED:
            with hostile.session.cursor().copy(hostile.on("COPY (SELECT org_id FROM {}) TO STDOUT", table)) as rows:
                assert {row[0] for row in rows.rows()} == {ACME}
            with hostile.session.cursor().copy(hostile.on("COPY {} TO STDOUT", table)) as rows:
                assert not any(b"other" in bytes(block) for block in rows)
            with (
                pytest.raises(psycopg.Error),
                hostile.session.cursor().copy(hostile.on("COPY {} FROM STDIN", table)) as into,
            ):
                into.write(b"other\n")

    def test_what_was_gathered_of_the_tables(self, hostile: Hostile) -> None:
        hostile.owner.execute("ANALYZE")
        seen = hostile.ask("SELECT tablename FROM pg_stats WHERE schemaname = 'public'")
        assert {name for (name,) in seen} <= {"instances", "api_key_hash_keys", "external_agents_schema_version"}

    def test_it_becomes_nobody_else(self, hostile: Hostile) -> None:
        hostile.ask("SELECT set_config('app.org_ids', 'acme', false)")
        for statement in (
            "SET ROLE external_agents",
            "SET SESSION AUTHORIZATION external_agents",
            "ALTER ROLE CURRENT_USER BYPASSRLS",
            "SET session_replication_role = replica",
        ):
            with pytest.raises(psycopg.Error):
                hostile.session.execute(statement)
        hostile.session.execute("SET row_security = off")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            hostile.session.execute("SELECT * FROM external_agents")

    def test_a_leaky_function_is_not_shown_the_rows(self, hostile: Hostile) -> None:
        """What costs next to nothing would be asked first, were it not for the barrier."""
        hostile.session.execute(
            "CREATE FUNCTION pg_temp.leak(text, text) RETURNS boolean LANGUAGE plpgsql COST 0.0000001 AS"
            " $$ BEGIN RAISE NOTICE 'leaked % %', $1, $2; RETURN true; END $$"
        )
        told: list[str] = []
        hostile.session.add_notice_handler(lambda notice: told.append(str(notice.message_primary)))
        hostile.ask("SELECT set_config('app.org_ids', 'acme', false)")
        assert len(hostile.ask("SELECT name FROM external_agents WHERE pg_temp.leak(org_id, name)")) == 1
        assert len(told) == 1
        hostile.session.execute(
            "CREATE TEMP VIEW mine AS SELECT * FROM external_agents WHERE pg_temp.leak(org_id, name)"
        )
        assert len(hostile.ask("SELECT * FROM mine")) == 1
        assert not any("other" in line for line in told)

    def test_a_join_or_a_subquery_reaches_no_further(self, hostile: Hostile) -> None:
        hostile.ask("SELECT set_config('app.org_ids', 'acme', false)")
        found = hostile.ask(
            "SELECT one.org_id, (SELECT string_agg(DISTINCT org_id, ' ') FROM external_agent_budgets)"
            " FROM external_agents AS one FULL JOIN external_agent_invocations AS two ON one.id = two.external_agent_id"
        )
        assert set(found) == {(ACME, ACME)}

    def test_the_owners_functions_look_where_they_always_do(self, hostile: Hostile) -> None:
        """Whatever stands before our tables and the system's functions in the search path of the session."""
        key = next(iter(hostile.owner.execute("SELECT id FROM api_keys WHERE org_id = 'other'")))[0]
        hostile.session.execute(
            """
            CREATE TEMP TABLE api_keys (LIKE public.api_keys);
            CREATE TEMP TABLE api_key_hash_keys (LIKE public.api_key_hash_keys);
            CREATE TEMP TABLE external_agent_secrets (LIKE public.external_agent_secrets);
            CREATE TEMP TABLE instances (LIKE public.instances);
            CREATE TEMP TABLE external_agent_invocations (LIKE public.external_agent_invocations);
            CREATE TEMP TABLE external_agent_idempotency_keys (LIKE public.external_agent_idempotency_keys);
            CREATE FUNCTION pg_temp.clock_timestamp() RETURNS timestamptz LANGUAGE sql
                AS $$ SELECT 'infinity'::timestamptz $$;
            SET search_path = pg_temp, pg_catalog, public;
            """
        )
        assert len(hostile.ask("SELECT id FROM public.external_agents_api_keys(%s)", [key])) == 1
        assert hostile.ask("SELECT public.external_agents_needed_keys()") == [(["k1"],), (["k1"],)]
        hostile.session.execute("SELECT public.external_agents_note_uses(ARRAY[%s::uuid], ARRAY[now()])", [key])
        noted = hostile.owner.execute("SELECT id FROM api_keys WHERE last_used_at IS NOT NULL").fetchall()
        assert noted == [(key,)]
        assert hostile.ask("SELECT public.external_agents_clear_idempotency_keys(1000)") == [(0,)]
        running = hostile.owner.execute("SELECT id FROM instances").fetchone()
        assert running is not None
        hostile.session.execute("SELECT public.external_agents_forget_instance(%s)", running)
        assert hostile.owner.execute("SELECT count(*) FROM instances").fetchone() == (1,)
        with pytest.raises(psycopg.errors.RaiseException):
            hostile.session.execute("SELECT public.external_agents_add_partition('2500-01-01')")

    def test_sealed_hash_keys_are_there_to_be_read_alone(self, hostile: Hostile) -> None:
        """They belong to no organisation, and say nothing without the secret keys."""
        hostile.owner.execute("INSERT INTO api_key_hash_keys VALUES ('k0', 'k1', 'sealed')")
        hostile.ask("SELECT set_config('app.org_ids', 'acme,other', false)")
        assert hostile.ask("SELECT hash_key_id FROM api_key_hash_keys") == [("k0",)]
        tried: list[LiteralString] = [
            "INSERT INTO api_key_hash_keys VALUES ('k1', 'k1', 'mine')",
            "UPDATE api_key_hash_keys SET envelope = 'mine'",
            "DELETE FROM api_key_hash_keys",
            "TRUNCATE api_key_hash_keys",
        ]
        for statement in tried:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                hostile.session.execute(statement)

    def test_group_commit_has_no_more_rights_than_its_caller(self, hostile: Hostile) -> None:
        [(definer,)] = hostile.ask("SELECT prosecdef FROM pg_proc WHERE proname = 'external_agents_commit'")
        assert not definer

    def test_nobody_else_may_call_the_owners_functions(self, hostile: Hostile, postgres_server: PostgresServer) -> None:
        found = hostile.owner.execute(
            "SELECT proname, proacl::text, array_to_string(proconfig, ' ') FROM pg_proc WHERE prosecdef"
        ).fetchall()
        assert len(found) == 7
        for name, rights, settings in found:
            assert "{=" not in rights, name
            assert ",=" not in rights, name
            assert settings == "search_path=public, pg_temp", name


def _tried(session: psycopg.Connection, statement: sql.Composed) -> bool:
    """Whether anything came of it."""
    try:
        return session.execute(statement).rowcount > 0
    except psycopg.errors.InsufficientPrivilege:
        return False


class TestTheService:
    """With the lesser role, where the work spans organisations. The contracts prove the rest."""

    async def test_a_batch_of_several_organisations(self, engine: AsyncEngine, agents: PostgresAgents) -> None:
        made = [make_agent(org_id=f"org-{n}", budget_config=BOUGHT) for n in range(20)]
        await agents.bulk(made)
        scene = await watched(engine)
        [first] = await scene.running(made[0])
        running = await asyncio.gather(*(scene.running(agent, 2) for agent in made))
        left = [first, *(one for ones in running for one in ones)]
        assert max(admissions for admissions, _ in scene.sizes) > 2
        one_by_one: list[str] = []
        event.listen(engine.sync_engine, "before_cursor_execute", lambda *call: one_by_one.append(call[2]))
        settled = await asyncio.gather(*(scene.ledger.settle(conclude(one)) for one in left))
        assert one_by_one == [], "the batch finds all that it is to settle"
        assert {one.status for one in settled} == {InvocationStatus.SUCCEEDED}
        for agent in made[1:]:
            account = (await scene.ledger.forecast(agent.org_id, agent.id)).account
            assert (account.spent, account.reserved) == (2, 0)

    async def test_nothing_of_a_transaction_is_left_for_the_next(self, engine: AsyncEngine) -> None:
        await furnish(engine)
        single = create_engine(engine.url.render_as_string(hide_password=False), pool_size=1, row_security=True)
        count = text("SELECT count(*) FROM external_agents")
        for broken in (False, True):
            for begun in (reading_of(reading(single), ACME), transaction(single, ACME)):
                try:
                    async with begun as connection:
                        assert await connection.scalar(count) == 1
                        if broken:
                            raise InterruptedError
                except InterruptedError:
                    pass
                async with reading(single).connect() as connection:
                    assert await connection.scalar(count) == 0
                    open_since = await connection.scalar(
                        text("SELECT xact_start = query_start FROM pg_stat_activity WHERE pid = pg_backend_pid()")
                    )
                    assert open_since, "a statement of its own"
        await single.dispose()

    @pytest.mark.parametrize("org_id", ["", "acme,other", "acme'; --", "a" * 101])
    async def test_a_name_that_would_be_two_or_none_is_refused(self, engine: AsyncEngine, org_id: str) -> None:
        with pytest.raises(ValueError, match="organisation"):
            async with transaction(engine, org_id):
                pass
        with pytest.raises(ValueError, match="organisation"):
            async with reading_of(reading(engine), org_id):
                pass

    async def test_recovery_ends_what_a_dead_process_left_in_several_organisations(
        self, owner_url: str, role: str
    ) -> None:
        clock = ShiftedClock(owner_url)
        engine = create_engine(as_role(clock.url, role), row_security=True)
        made = [make_agent(org_id=f"org-{n}", budget_config=BOUGHT) for n in range(3)]
        await PostgresAgents(engine, key_id_of=lambda envelope: "k1").bulk(made)
        dead, judge = PostgresLedger(engine, uuid4()), PostgresLedger(engine, uuid4())
        left = [(await dead.admit(make_request(agent))).invocation for agent in made for _ in range(50)]
        for _ in range(int(LEASE_S // HEARTBEAT_S) + 2):
            await judge.heartbeat()
            await clock.pass_time(HEARTBEAT_S)
        await judge.heartbeat()
        assert await judge.recover() == len(left)
        reader = PostgresInvocations(engine)
        for one in left:
            ended = await reader.read(one.org_id, one.external_agent_id, one.id)
            assert ended.status is InvocationStatus.UNKNOWN
        for agent in made:
            account = (await judge.forecast(agent.org_id, agent.id)).account
            assert (account.spent, account.reserved) == (50, 0)
        with psycopg.connect(dsn(owner_url)) as connection:
            assert connection.execute("SELECT count(*) FROM instances").fetchone() == (1,)
        await engine.dispose()

    async def test_a_process_that_retires_with_something_running_is_not_forgotten(self, engine: AsyncEngine) -> None:
        """Under row security its invocations are not seen, and it must not be taken for one that has none."""
        agent = make_agent(org_id=ACME)
        await PostgresAgents(engine, key_id_of=lambda envelope: "k1").create(agent)
        ledger = PostgresLedger(engine, uuid4())
        await ledger.admit(make_request(agent))
        await ledger.retire()
        async with engine.connect() as connection:
            assert await connection.scalar(text("SELECT count(*) FROM instances")) == 1

    async def test_partitions_are_made_for_it_and_closed_to_it(
        self, owner_url: str, role: str, engine: AsyncEngine, agents: PostgresAgents
    ) -> None:
        agent = make_agent(org_id=ACME)
        await agents.create(agent)
        with psycopg.connect(dsn(owner_url)) as owner:
            owner.execute(
                sql.SQL("ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO {}, PUBLIC").format(sql.Identifier(role))
            )
        assert await keep_partitions(engine) == []
        async with engine.connect() as connection:
            made = await connection.run_sync(add_missing_partitions, YEAR_END)
        assert len(made) == 4
        with psycopg.connect(dsn(owner_url)) as owner:
            for name in made:
                rights = owner.execute(
                    "SELECT relrowsecurity, relowner::regrole = current_user::regrole,"
                    " has_table_privilege(%s, oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER')"
                    " FROM pg_class WHERE relname = %s",
                    [role, name],
                ).fetchone()
                assert rights == (True, True, False), name
        await PostgresLedger(engine, uuid4()).record(make_finished_call(agent))
        assert role_fault(as_role(owner_url, role), row_security=True) is None

    async def test_expired_keys_are_cleared_and_no_others(
        self, owner_url: str, engine: AsyncEngine, agents: PostgresAgents
    ) -> None:
        for org_id in (ACME, OTHER):
            await agents.create(make_agent(org_id=org_id))
        with psycopg.connect(dsn(owner_url)) as owner:
            for age in ("25 hours", "23 hours"):
                owner.execute(
                    "INSERT INTO external_agent_idempotency_keys"
                    " SELECT org_id, id, %s, '', gen_random_uuid(), now() - %s::interval FROM external_agents",
                    [age, age],
                )
        assert await clear_expired(engine) == 2
        with psycopg.connect(dsn(owner_url)) as owner:
            left = owner.execute("SELECT key FROM external_agent_idempotency_keys").fetchall()
        assert left == [("23 hours",)] * 2

    async def test_api_keys_are_found_by_id_and_listed_by_organisation(self, engine: AsyncEngine) -> None:
        store = PostgresApiKeys(engine)
        mine, theirs = api_key(ACME), api_key(OTHER)
        await store.add(mine)
        await store.add(theirs)
        assert await store.find(mine.id) == [mine]
        assert [key.id for key in await store.list(ACME)] == [mine.id]
        now = datetime.now(UTC)
        assert await store.revoke(theirs.id, now)
        assert await store.find(theirs.id) == [attrs.evolve(theirs, revoked_at=now)]
        assert not await store.revoke(UUID(int=1), now)

    async def test_api_keys_are_found_and_listed_with_what_they_were_hashed_with(
        self, owner_url: str, engine: AsyncEngine
    ) -> None:
        with psycopg.connect(dsn(owner_url)) as owner:
            owner.execute("INSERT INTO api_key_hash_keys VALUES ('k1', 'k2', 'sealed')")
        store = PostgresApiKeys(engine)
        key = api_key(ACME)
        await store.add(key)
        for found in (await store.find(key.id), await store.list(ACME)):
            assert [(one.id, one.sealed_hash_key) for one in found] == [(key.id, b"sealed")]

    async def test_whoever_waits_gets_an_answer_in_time(self, owner_url: str, role: str, engine: AsyncEngine) -> None:
        """By the client's own clock: the server's limits are lifted, and another one holds every table."""
        await furnish(engine)
        unlimited = f"{as_role(owner_url, role)}&options={quote('-c lock_timeout=0 -c statement_timeout=0')}"
        patient = create_engine(unlimited, pool_size=20, row_security=True)
        agents = PostgresAgents(patient, key_id_of=lambda envelope: "k1")
        reader, store = PostgresInvocations(patient), PostgresApiKeys(patient)
        agent, now, of_acme = make_agent(org_id=ACME), datetime.now(UTC), AgentQuery(org_id=ACME)
        with psycopg.connect(dsn(owner_url)) as owner:
            for table in [*FILLED, "api_key_hash_keys"]:
                owner.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(sql.Identifier(table)))
            waited_for = (
                agents.read(ACME, agent.id),
                agents.count(of_acme),
                agents.list(of_acme, offset=0, limit=1),
                agents.create(agent),
                agents.update(attrs.evolve(agent, version=2)),
                reader.exists(ACME, uuid4()),
                reader.count(InvocationQuery(org_id=ACME)),
                PostgresLedger(patient, uuid4()).record(make_finished_call(agent)),
                PostgresLedger(patient, uuid4()).forecast(ACME, agent.id),
                store.add(api_key(ACME)),
                store.find(uuid4()),
                store.list(ACME),
                store.revoke(uuid4(), now),
                store.note_uses({uuid4(): now}),
                PostgresEnvelopes(patient, key_id_of=lambda envelope: "k1").key_ids(),
            )
            async with asyncio.timeout(60):
                answers = await asyncio.gather(*waited_for, return_exceptions=True)
        assert {type(answer) for answer in answers} == {Unavailable}, answers
        assert await agents.count(of_acme) == 1
        async with reading(patient).connect() as connection:
            assert await connection.scalar(text("SELECT count(*) FROM external_agents")) == 0
        await patient.dispose()

    async def test_uses_of_api_keys_are_noted_over_organisations(self, engine: AsyncEngine) -> None:
        store = PostgresApiKeys(engine)
        keys = [api_key(org_id) for org_id in (ACME, OTHER, ACME)]
        for key in keys:
            await store.add(key)
        used = datetime(2026, 3, 10, 12, 30, tzinfo=UTC)
        await store.note_uses({keys[0].id: used, keys[1].id: used, uuid4(): used})
        noted = {key.id: key.last_used_at for key in await store.find(*(key.id for key in keys))}
        assert noted == {keys[0].id: used, keys[1].id: used, keys[2].id: None}

    async def test_which_secret_keys_are_needed_is_known_over_organisations(
        self, owner_url: str, engine: AsyncEngine
    ) -> None:
        """And nothing else of what they seal: a count over no rows would say that a key may be taken away."""
        await furnish(engine)
        store = PostgresApiKeys(engine)
        now = datetime.now(UTC)
        for hash_key_id, changes in (
            ("k0", {"expires_at": now}),
            ("k3", {"revoked_at": now}),
            ("k4", {}),
            ("k5", {"org_id": OTHER}),
        ):
            key = api_key(str(changes.pop("org_id", ACME)))
            await store.add(attrs.evolve(key, hash_key_id=hash_key_id, **changes))
        with psycopg.connect(dsn(owner_url)) as owner:
            owner.execute("INSERT INTO api_key_hash_keys VALUES ('k5', 'k6', 'sealed'), ('k7', 'k8', 'sealed')")
            owner.execute("UPDATE external_agent_secrets SET key_id = 'k2' WHERE org_id = 'other'")
        envelopes = PostgresEnvelopes(engine, key_id_of=lambda envelope: "k1")
        needed = sorted(sorted(ids) for ids in await envelopes.key_ids())
        assert needed == [["k1"], ["k2"], ["k4"], ["k5", "k6"]]
        for refused in (envelopes.uses, envelopes.hash_keys, partial(envelopes.reseal, "k1", _resealed, after=None)):
            with pytest.raises(ConfigurationError, match="owner"):
                await refused()


def _resealed(agent: ExternalAgent, field: str) -> bytes:
    return agent.sealed[field]


class TestRoles:
    def test_every_table_of_tenants_has_the_policy_and_leaves_the_owner_free(self, owner_url: str) -> None:
        with psycopg.connect(dsn(owner_url)) as owner:
            found = owner.execute(
                "SELECT relname::text, relrowsecurity, relforcerowsecurity,"
                " array_agg(pg_get_expr(polqual, pg_class.oid))"
                " FROM pg_class LEFT JOIN pg_policy ON polrelid = pg_class.oid"
                " WHERE pg_class.oid IN (SELECT attrelid FROM pg_attribute WHERE attname = 'org_id')"
                " AND relkind IN ('r', 'p') AND NOT relispartition GROUP BY 1, 2, 3"
            ).fetchall()
        policy = (
            "(strpos(((','::text || current_setting('app.org_ids'::text, true)) || ','::text),"
            " ((','::text || org_id) || ','::text)) > 0)"
        )
        assert sorted(found) == sorted((name, True, False, [policy]) for name in TABLES)

    def test_the_role_has_these_rights_and_no_others(self, owner_url: str, role: str) -> None:
        with psycopg.connect(dsn(owner_url)) as owner:
            given = dict(
                owner.execute(
                    "SELECT relname::text, string_agg(privilege_type, ', ' ORDER BY privilege_type)"
                    " FROM pg_class, aclexplode(relacl) WHERE grantee = %s::regrole GROUP BY 1",
                    [role],
                ).fetchall()
            )
            owned = owner.execute("SELECT count(*) FROM pg_class WHERE relowner = %s::regrole", [role]).fetchone()
        wanted = {table.name: ", ".join(sorted(rights.split(", "))) for table, rights in RIGHTS.items()}
        assert given == {**wanted, "external_agents_schema_version": "SELECT"}
        assert owned == (0,)

    def test_migrating_again_takes_away_what_was_given_besides(self, owner_url: str, role: str) -> None:
        with psycopg.connect(dsn(owner_url)) as owner:
            owner.execute(sql.SQL("GRANT ALL ON ALL TABLES IN SCHEMA public TO {}").format(sql.Identifier(role)))
            owner.execute("GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA public TO PUBLIC")
        assert migrate(owner_url, role) == []
        self.test_the_role_has_these_rights_and_no_others(owner_url, role)
        with psycopg.connect(dsn(owner_url)) as owner:
            public = owner.execute(
                "SELECT proname FROM pg_proc, aclexplode(proacl) WHERE prosecdef AND grantee = 0"
            ).fetchall()
        assert public == []

    def test_with_one_role_nobody_else_may_call_the_owners_functions(self, postgres_url: str) -> None:
        with psycopg.connect(dsn(postgres_url)) as owner:
            found = owner.execute(
                "SELECT has_function_privilege('public', oid, 'EXECUTE') FROM pg_proc WHERE prosecdef"
            ).fetchall()
        assert found == [(False,)] * 7

    def test_a_role_that_is_not_there(self, postgres_url: str) -> None:
        with pytest.raises(ConfigurationError, match="nobody_at_all"):
            migrate(postgres_url, "nobody_at_all")

    def test_which_role_may_serve(self, owner_url: str, role: str, postgres_server: PostgresServer) -> None:
        lesser = as_role(owner_url, role)
        assert role_fault(lesser, row_security=True) is None
        assert "does not own" in str(role_fault(lesser, row_security=False))
        assert role_fault(owner_url, row_security=False) is None
        assert "owns the tables" in str(role_fault(owner_url, row_security=True))
        name = sql.Identifier(role)
        postgres_server.execute(sql.SQL("ALTER ROLE {} BYPASSRLS").format(name))
        try:
            assert "bypasses" in str(role_fault(lesser, row_security=True))
        finally:
            postgres_server.execute(sql.SQL("ALTER ROLE {} NOBYPASSRLS").format(name))
        postgres_server.execute(sql.SQL("CREATE ROLE the_owner"))
        try:
            with psycopg.connect(dsn(owner_url)) as owner:
                owner.execute("ALTER TABLE external_agent_secrets OWNER TO the_owner")
            assert role_fault(lesser, row_security=True) is None
            postgres_server.execute(sql.SQL("GRANT the_owner TO {}").format(name))
            assert "may become" in str(role_fault(lesser, row_security=True))
            postgres_server.execute(sql.SQL("REVOKE the_owner FROM {}").format(name))
            with psycopg.connect(dsn(owner_url)) as owner:
                owner.execute("ALTER TABLE external_agent_secrets OWNER TO external_agents")
                owner.execute("ALTER TABLE external_agent_secrets DISABLE ROW LEVEL SECURITY")
            assert "external_agent_secrets" in str(role_fault(lesser, row_security=True))
        finally:
            postgres_server.execute(sql.SQL("DROP ROLE the_owner"))

    async def test_a_role_without_rights(self, postgres_url: str, postgres_server: PostgresServer) -> None:
        with postgres_server.role() as stranger:
            engine = create_engine(as_role(postgres_url, stranger), row_security=True)
            agent: ExternalAgent = make_agent(org_id=ACME)
            with pytest.raises(Unavailable, match="rights"):
                await PostgresAgents(engine, key_id_of=lambda envelope: "k1").create(agent)
            await engine.dispose()
