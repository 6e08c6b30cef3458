"""
Row-level security: what a statement may see and change is told to the database, organisation by organisation.

Each table of tenants has the same policy: its rows are there for whom `app.org_ids` names their organisation. The
setting is one of the transaction, so it goes with it and no later user of the connection inherits it. Without it there
are no rows. The owner of the tables is exempt, so that one role can be enough; then nothing is set, and nothing asked.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from external_agents.domain.access import ORG_ID_PATTERN

OPTION = "row_security"
"""Of an engine: its role does not own the tables, and row security is to hold for it."""

_CONFINE = text("SELECT set_config('app.org_ids', :org_ids, true)")
_RUNNING = text("SELECT external_agents_running_organisations(:instance, :at_most)")


@asynccontextmanager
async def read_confined(connection: AsyncConnection, org_id: str) -> AsyncIterator[None]:
    """
    What a connection that commits each statement reads in this block is about one organisation.

    With row security it is read in a transaction, of which the begin and the setting are sent as one.
    """
    if not is_on(connection.engine):
        yield
        return
    # An organisation's id has nothing in it that needs quoting.
    await connection.exec_driver_sql(f"BEGIN; SET LOCAL app.org_ids = '{_setting([org_id])}'")
    yield
    # Else the pool rolls it back, and the statements that are prepared are lost with it.
    await connection.exec_driver_sql("COMMIT")


async def confine(connection: AsyncConnection, org_ids: Iterable[str]) -> None:
    """Within a transaction: from now on, it is about these organisations."""
    if is_on(connection.engine):
        await connection.execute(_CONFINE, {"org_ids": _setting(org_ids)})


async def confine_to_running(connection: AsyncConnection, instance: UUID, at_most: int) -> None:
    """The same, about the organisations of the first invocations that an instance has running."""
    if is_on(connection.engine):
        await confine(connection, await connection.scalar(_RUNNING, {"instance": instance, "at_most": at_most}) or ())


def is_on(engine: AsyncEngine) -> bool:
    """As `create_engine` was told."""
    return bool(engine.get_execution_options().get(OPTION))


def _setting(org_ids: Iterable[str]) -> str:
    names = sorted(set(org_ids))
    for name in names:
        # A comma in one would make two of it.
        if re.fullmatch(ORG_ID_PATTERN, name) is None:
            raise ValueError(f"{name!r} is no organisation's id")
    return ",".join(names)
