"""Connections to PostgreSQL: bounded in number, in waiting, and in how long a dead peer goes unnoticed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
from sqlalchemy import URL, event, make_url
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from external_agents.adapters.postgres.driver import Connection
from external_agents.adapters.postgres.errors import WHAT, translate_errors
from external_agents.adapters.postgres.row_security import OPTION, confine, read_confined
from external_agents.domain.errors import Unavailable

ANSWER_S = 4.0
"""What a caller waits for the database, from asking the pool for a connection on: 503 comes within 5 s."""
POOL_SIZE = 10
POOL_WAIT_S = 3.0
CONNECT_TIMEOUT_S = 4
LOCK_TIMEOUT_S = 5
STATEMENT_TIMEOUT_S = 15

CONNECTION_DEFAULTS = {
    "application_name": "external-agents",
    "connect_timeout": CONNECT_TIMEOUT_S,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
"""libpq's parameters; the URL may say otherwise."""

SERVER_SETTINGS = {
    "TimeZone": "UTC",
    # Single statements run without BEGIN, so that no one else says it. What is read behind a lock must be read anew.
    "default_transaction_isolation": "read\\ committed",
    "lock_timeout": f"{LOCK_TIMEOUT_S}s",
    "statement_timeout": f"{STATEMENT_TIMEOUT_S}s",
    # A transaction whose client is stuck would keep an agent's row locked for everybody.
    "idle_in_transaction_session_timeout": f"{STATEMENT_TIMEOUT_S}s",
    # Every statement has its index. A plan that was made and kept while a table, or next month's partition, was empty
    # would read it as a whole, ever slower, until statistics are gathered.
    "enable_seqscan": "off",
}


def create_engine(
    url: str, *, pool_size: int = POOL_SIZE, pool_wait_s: float = POOL_WAIT_S, row_security: bool = False
) -> AsyncEngine:
    """
    An engine for the adapters of this package. Nothing connects before its first use; whoever made it disposes of it.

    Args:
        url: `postgresql+psycopg://…`; parameters of libpq in its query, `options` included, win over ours.
        pool_size: The most connections that this process opens. More do not make one busy agent faster: its
            admissions wait for each other.
        pool_wait_s: How long a call waits for one of them before it is `Unavailable`.
        row_security: The role does not own the tables; every transaction tells which organisations it is about.
    """
    parsed = make_url(url)
    engine = create_async_engine(
        parsed,
        poolclass=AsyncAdaptedQueuePool,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=pool_wait_s,
        isolation_level="READ COMMITTED",
        hide_parameters=True,
        connect_args={**connect_args(parsed), "async_creator_fn": Connection.connect},
        execution_options={OPTION: row_security},
    )
    event.listen(engine.sync_engine, "checkout", _require_open)
    return engine


def reading(engine: AsyncEngine) -> AsyncEngine:
    """The same connections for single statements: without BEGIN and ROLLBACK, in a third of the round trips."""
    return engine.execution_options(isolation_level="AUTOCOMMIT")


@asynccontextmanager
async def connected(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """For what a caller waits for: all of it within ANSWER_S, or `Unavailable`. Raises as `translate_errors` does."""
    async with _answered(ANSWER_S), engine.connect() as connection:
        yield connection


@asynccontextmanager
async def reading_of(engine: AsyncEngine, org_id: str) -> AsyncIterator[AsyncConnection]:
    """As `connected`, of an engine of `reading`, for statements about one organisation; see `read_confined`."""
    async with connected(engine) as connection, read_confined(connection, org_id):
        yield connection


@asynccontextmanager
async def transaction(
    engine: AsyncEngine, *org_ids: str, within_s: float | None = None
) -> AsyncIterator[AsyncConnection]:
    """
    Commits when the block ends well. Raises as `translate_errors` does.

    Args:
        org_ids: The organisations whose rows it reads or writes; with row security it sees no others.
        within_s: After so long, from asking the pool for a connection on, it is `Unavailable`.
    """
    async with _answered(within_s), engine.begin() as connection:
        if org_ids:
            await confine(connection, org_ids)
        yield connection


@asynccontextmanager
async def _answered(within_s: float | None) -> AsyncIterator[None]:
    """A server that stands still, or a network that swallows everything, raises nothing by itself."""
    with translate_errors():
        try:
            async with asyncio.timeout(within_s):
                yield
        except TimeoutError as error:
            raise Unavailable(WHAT) from error


def is_open(connection: Any) -> bool:
    """Whether the server has not closed this connection of the driver's; found out without asking the server."""
    try:
        for _ in range(2):  # The first may read no further than the server's last words.
            connection.pgconn.consume_input()
    except psycopg.OperationalError:
        return False
    return True


def _require_open(connection: Any, record: object, fairy: object) -> None:
    """The pool makes new ones: else after a restart of the server each would fail somebody, in doubt what was done."""
    if not is_open(connection.driver_connection):
        raise InvalidatePoolError


def connect_args(url: URL) -> dict[str, Any]:
    options = " ".join(f"-c {name}={value}" for name, value in SERVER_SETTINGS.items())
    given = url.query.get("options", "")
    return {
        **{name: value for name, value in CONNECTION_DEFAULTS.items() if name not in url.query},
        "options": f"{options} {given if isinstance(given, str) else ' '.join(given)}".strip(),
    }
