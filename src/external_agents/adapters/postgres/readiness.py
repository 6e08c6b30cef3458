"""Whether the database can be worked with right now."""

from __future__ import annotations

import attrs
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.postgres.driver import DISK
from external_agents.adapters.postgres.engine import connected
from external_agents.adapters.postgres.roles import fault_of_role
from external_agents.adapters.postgres.row_security import is_on
from external_agents.adapters.postgres.schema import has_newest_schema
from external_agents.domain.errors import Unavailable

FULL_DISK_TOLD_S = 5.0
"""After the last refusal; then somebody has to try again."""


@attrs.frozen
class Readiness:
    """
    Attributes:
        database: It can be reached.
        schema: It has the newest schema.
        disk: It has not refused to write for want of room of late.
        role: Why the role is not one to serve with, in one line; None where it is.
    """

    database: bool
    schema: bool
    disk: bool = True
    role: str | None = None


async def check(engine: AsyncEngine) -> Readiness:
    """Look now, with row security also at the role; an outage is an answer, not an error."""
    try:
        async with connected(engine) as connection:
            schema = await connection.run_sync(has_newest_schema)
            role = await connection.run_sync(_fault_of_confined) if is_on(engine) else None
            return Readiness(database=True, schema=schema, disk=not DISK.was_full(FULL_DISK_TOLD_S), role=role)
    except Unavailable:
        return Readiness(database=False, schema=False)


def _fault_of_confined(connection: Connection) -> str | None:
    return fault_of_role(connection, row_security=True)
