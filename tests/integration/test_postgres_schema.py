"""Migrations: up, down and up again, by several at once, beside a host's own tables; and readiness."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from alembic import command
from psycopg import sql
from sqlalchemy import NullPool, create_engine

from external_agents.adapters.postgres import schema
from external_agents.adapters.postgres.readiness import Readiness, check
from external_agents.domain.errors import ConfigurationError, Unavailable
from postgres_server import OpenEngine, PostgresServer, dsn

AGENT_ROW = """{
    "org_id": "acme", "id": "019ab0c5-7a52-7f3e-9c1d-2b8f4a6e0d13", "name": "x", "description": "",
    "provider": "custom", "webhook_url": "https://agent.example.com/", "auth_type": "none", "auth_config": {},
    "platform_config": {}, "tags": [], "timeout_s": 30, "max_attempts": 3, "status": "active", "created_by": "tester",
    "updated_by": "tester", "created_at": "2026-03-10T12:00:00Z", "updated_at": "2026-03-10T12:00:00Z", "version": 1,
    "name_folded": "x", "description_folded": "", "previous_signing_secret_until": "2026-03-11T12:00:00Z"
}"""
ALL = ["0001 Foundation", "0002 Group commit", "0003 Signing secrets", "0004 Keys", "0005 Row security"]


@pytest.fixture
def empty_url(postgres_server: PostgresServer) -> Iterator[str]:
    with postgres_server.database() as name:
        yield postgres_server.url(name)


def alembic(url: str, name: str, *arguments: str) -> None:
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        getattr(command, name)(schema.config_for(connection), *arguments)


def relations(url: str) -> set[tuple[str, str]]:
    """Everything that a migration could make or forget, by kind."""
    with psycopg.connect(dsn(url)) as connection:
        return set(
            connection.execute(
                """
                SELECT relkind::text, relname FROM pg_class WHERE relnamespace = 'public'::regnamespace
                UNION SELECT 'constraint', conrelid::regclass || '.' || conname FROM pg_constraint
                    WHERE connamespace = 'public'::regnamespace
                UNION SELECT 'type', typname FROM pg_type WHERE typnamespace = 'public'::regnamespace
                UNION SELECT 'function', proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace
                """
            ).fetchall()
        )


def test_up_down_and_up_again(empty_url: str) -> None:
    nothing = relations(empty_url)
    assert schema.pending(empty_url) == ALL
    assert not schema.is_current(empty_url)
    assert schema.migrate(empty_url) == ALL
    assert schema.is_current(empty_url)
    assert schema.migrate(empty_url) == []
    alembic(empty_url, "check")
    everything = relations(empty_url)
    alembic(empty_url, "downgrade", "base")
    left = {
        relation for relation in relations(empty_url) - nothing if "external_agents_schema_version" not in relation[1]
    }
    assert left == set()
    assert schema.pending(empty_url) == ALL
    assert schema.migrate(empty_url) == ALL
    assert relations(empty_url) == everything


def test_signing_secrets_go_with_what_ends_their_time(postgres_url: str) -> None:
    with psycopg.connect(dsn(postgres_url)) as connection:
        insertion = "INSERT INTO external_agents SELECT * FROM json_populate_record(NULL::external_agents, %s)"
        connection.execute(insertion, (AGENT_ROW,))
        for field in ("auth_config.key", "signing_secret", "signing_secret.previous"):
            connection.execute(
                "INSERT INTO external_agent_secrets SELECT org_id, id, %s, 'k1', '' FROM external_agents", (field,)
            )
    alembic(postgres_url, "downgrade", "0002")
    schema.migrate(postgres_url)
    with psycopg.connect(dsn(postgres_url)) as connection:
        assert connection.execute("SELECT field FROM external_agent_secrets").fetchall() == [("auth_config.key",)]


def test_a_hosts_own_tables_are_left_alone(empty_url: str) -> None:
    with psycopg.connect(dsn(empty_url)) as connection:
        connection.execute("CREATE TABLE alembic_version (version_num text); CREATE TABLE theirs (id int)")
        connection.execute("INSERT INTO alembic_version VALUES ('theirs')")
    schema.migrate(empty_url)
    alembic(empty_url, "check")
    alembic(empty_url, "downgrade", "base")
    with psycopg.connect(dsn(empty_url)) as connection:
        assert connection.execute("SELECT * FROM alembic_version, theirs").fetchall() == []
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("theirs",)]


def test_of_several_that_migrate_one_works(empty_url: str) -> None:
    with ThreadPoolExecutor(6) as threads:
        applied = list(threads.map(schema.migrate, [empty_url] * 6))
    assert sorted(applied) == [[]] * 5 + [ALL]


def test_a_newer_database_is_refused(postgres_url: str) -> None:
    with psycopg.connect(dsn(postgres_url)) as connection:
        connection.execute("UPDATE external_agents_schema_version SET version_num = '9999'")
    for function in (schema.migrate, schema.pending, schema.is_current):
        with pytest.raises(ConfigurationError, match="newer"):
            function(postgres_url)


def test_a_database_of_another_encoding_is_refused(postgres_server: PostgresServer) -> None:
    name = sql.Identifier("test_latin")
    postgres_server.execute(sql.SQL("CREATE DATABASE {} ENCODING LATIN1 LOCALE 'C' TEMPLATE template0").format(name))
    try:
        with pytest.raises(ConfigurationError, match="LATIN1"):
            schema.migrate(postgres_server.url("test_latin"))
    finally:
        postgres_server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


def test_a_database_that_cannot_be_reached(postgres_server: PostgresServer) -> None:
    for url in (postgres_server.url("missing"), "postgresql+psycopg://nobody@127.0.0.1:1/none"):
        with pytest.raises(Unavailable):
            schema.migrate(url)


def test_every_tenant_tables_primary_key_begins_with_the_organisation(postgres_url: str) -> None:
    with psycopg.connect(dsn(postgres_url)) as connection:
        first_columns = dict(
            connection.execute(
                """
                SELECT indrelid::regclass::text, attname::text FROM pg_index
                JOIN pg_class ON pg_class.oid = indrelid AND relnamespace = 'public'::regnamespace
                JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0]
                WHERE indisprimary
                """
            ).fetchall()
        )
    others = {"api_keys", "api_key_hash_keys", "instances", "external_agents_schema_version"}
    assert {table for table, column in first_columns.items() if column != "org_id"} == others


async def test_readiness(
    postgres_url: str, empty_url: str, postgres_server: PostgresServer, open_engine: OpenEngine
) -> None:
    assert await check(open_engine(postgres_url)) == Readiness(database=True, schema=True)
    assert await check(open_engine(empty_url)) == Readiness(database=True, schema=False)
    assert await check(open_engine(postgres_server.url("missing"))) == Readiness(database=False, schema=False)
    await asyncio.to_thread(schema.migrate, empty_url)
    assert await check(open_engine(empty_url)) == Readiness(database=True, schema=True)
