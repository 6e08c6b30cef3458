"""Whether the database can be worked with right now."""

from __future__ import annotations

import attrs
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.postgres.driver import DISK
from external_agents.adapters.postgres.engine import connected
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
    """

    database: bool
    schema: bool
    disk: bool = True


async def check(engine: AsyncEngine) -> Readiness:
    """Look now; an outage is an answer, not an error."""
    try:
        async with connected(engine) as connection:
            schema = await connection.run_sync(has_newest_schema)
            return Readiness(database=True, schema=schema, disk=not DISK.was_full(FULL_DISK_TOLD_S))
    except Unavailable:
        return Readiness(database=False, schema=False)
