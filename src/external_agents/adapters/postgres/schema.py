"""Bringing a database to the newest schema, and telling whether it is there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, NullPool, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError

from external_agents.adapters.postgres.engine import connect_args
from external_agents.adapters.postgres.errors import translate_errors
from external_agents.adapters.postgres.partitions import add_missing_partitions, is_lock_timeout
from external_agents.adapters.postgres.roles import fault_of_role, grant_to
from external_agents.adapters.postgres.tables import metadata
from external_agents.domain.errors import ConfigurationError

OLDEST_SERVER = 15
MIGRATION_LOCK = 7_205_113_801
"""Advisory locks are the database's: every version of this library must take the same number."""
MIGRATION_LOCK_WAIT_S = 120
TABLE_LOCK_WAIT_S = 10
NEWEST = "head"


def _is_ours(name: str | None, kind: str, *_: object) -> bool:
    """Partitions come and go by themselves; what else a host keeps in the same schema is its own affair."""
    return kind != "table" or name in metadata.tables


MIGRATION_OPTIONS: dict[str, Any] = {
    "version_table": "external_agents_schema_version",
    "include_name": _is_ours,
    "compare_server_default": True,
}


def migrate(url: str, serving_role: str | None = None) -> list[str]:
    """
    Bring the database to the newest schema. Of several processes that do so at once one works and the others wait.

    Args:
        serving_role: Gets the rights that serving needs, and loses all others on our tables, every time.

    Returns:
        The names of the migrations that were applied, oldest first; none when it was current.

    Raises:
        Unavailable: It cannot be reached, or a lock was not to be had.
        ConfigurationError: It is too old, not in UTF-8, or was migrated by a newer version of this library; or there is
            no such role.
    """
    with _connection(url) as connection:
        _require_suitable(connection)
        connection.execute(text(f"SET statement_timeout = 0; SET lock_timeout = '{MIGRATION_LOCK_WAIT_S}s'"))
        # Of the session, since every migration has a transaction of its own; it goes with the connection.
        connection.execute(text("SELECT pg_advisory_lock(:number)"), {"number": MIGRATION_LOCK})
        connection.execute(text(f"SET lock_timeout = '{TABLE_LOCK_WAIT_S}s'"))
        connection.commit()
        names = _pending(connection)
        connection.commit()
        if names:
            command.upgrade(config_for(connection), NEWEST)
        try:
            add_missing_partitions(connection, datetime.now(UTC))
        except DBAPIError as error:
            # The default partition takes everything until upkeep finds a quieter moment.
            if not is_lock_timeout(error):
                raise
        if serving_role is not None:
            with connection.begin():
                grant_to(connection, serving_role, MIGRATION_OPTIONS["version_table"])
        return names


def pending(url: str) -> list[str]:
    """
    The names of the migrations that the database lacks, oldest first.

    Raises:
        Unavailable: It cannot be reached.
        ConfigurationError: It was migrated by a newer version of this library.
    """
    with _connection(url) as connection:
        return _pending(connection)


def is_current(url: str) -> bool:
    """Whether the database has the newest schema. Raises as `pending` does."""
    return not pending(url)


def role_fault(url: str, *, row_security: bool) -> str | None:
    """As `fault_of_role` of the role that the URL connects as. Raises `Unavailable`."""
    with _connection(url) as connection:
        return fault_of_role(connection, row_security=row_security)


def role_of(url: str) -> str:
    """
    The role that a URL connects as.

    Raises:
        ConfigurationError: It names none.
    """
    parsed = make_url(url)
    role = parsed.username or parsed.query.get("user")
    if not isinstance(role, str):
        raise ConfigurationError("The database's URL must name its role: postgresql://ROLE@HOST/DATABASE.")
    return role


def has_newest_schema(connection: Connection) -> bool:
    return _revision(connection) == _scripts().get_current_head()


def config_for(connection: Connection) -> Config:
    """For alembic's commands, over an open connection."""
    config = Config()
    # Values of the configuration are subject to interpolation.
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


@contextmanager
def _connection(url: str) -> Iterator[Connection]:
    parsed = make_url(url)
    engine = create_engine(
        parsed, poolclass=NullPool, hide_parameters=True, connect_args=connect_args(parsed), future=True
    )
    with translate_errors(), engine.connect() as connection:
        yield connection


def _require_suitable(connection: Connection) -> None:
    if (connection.dialect.server_version_info or ())[:1] < (OLDEST_SERVER,):
        raise ConfigurationError(f"PostgreSQL {OLDEST_SERVER} or later is needed.")
    if (encoding := connection.scalar(text("SHOW server_encoding"))) != "UTF8":
        raise ConfigurationError(f"The database's encoding is {encoding}: it must be made with UTF8.")


def _pending(connection: Connection) -> list[str]:
    revision = _revision(connection)
    scripts = _scripts()
    known = {script.revision for script in scripts.walk_revisions()}
    if revision is not None and revision not in known:
        raise ConfigurationError("The database was migrated by a newer version of external-agents: install that one.")
    missing = scripts.iterate_revisions(NEWEST, revision or "base")
    return [f"{script.revision} {script.doc.rstrip('.')}" for script in reversed(list(missing))]


def _revision(connection: Connection) -> str | None:
    options = {"version_table": MIGRATION_OPTIONS["version_table"]}
    return MigrationContext.configure(connection, opts=options).get_current_revision()


@cache
def _scripts() -> ScriptDirectory:
    return ScriptDirectory(str(Path(__file__).with_name("migrations")))
