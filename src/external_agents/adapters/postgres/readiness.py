"""Whether the database can be worked with right now."""

from __future__ import annotations

import attrs
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.postgres.engine import connected
from external_agents.adapters.postgres.schema import has_newest_schema
from external_agents.domain.errors import Unavailable


@attrs.frozen
class Readiness:
    """
    Attributes:
        database: It can be reached.
        schema: It has the newest schema.
    """

    database: bool
    schema: bool


async def check(engine: AsyncEngine) -> Readiness:
    """Look now; an outage is an answer, not an error."""
    try:
        async with connected(engine) as connection:
            return Readiness(database=True, schema=await connection.run_sync(has_newest_schema))
    except Unavailable:
        return Readiness(database=False, schema=False)
