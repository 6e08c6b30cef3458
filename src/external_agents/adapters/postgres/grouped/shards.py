"""Which organisations may share a call, where the tables are distributed by organisation."""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from external_agents.adapters.postgres.engine import reading
from external_agents.adapters.postgres.errors import translate_errors

KNOWN_MAX = 100_000

# A distributed database hashes the organisation with this very function, and gives each shard an equal range of hashes.
_SHARD = text("SELECT ((hashtext(:org_id)::bigint + 2147483648) * :count) >> 32")


class ShardGroups:
    """
    As many groups as the tables have shards: a call that stays within one goes to one server, in one commit.

    On a single PostgreSQL there is one group, and everybody shares.
    """

    def __init__(self, engine: AsyncEngine, count: int) -> None:
        self.count = count
        self._engine = reading(engine)
        self._known: dict[str, int] = {}

    async def group_of(self, org_id: str) -> int:
        """
        Raises:
            Unavailable: The database has to be asked, and cannot be.
        """
        if self.count == 1:
            return 0
        if org_id not in self._known:
            with translate_errors():
                async with self._engine.connect() as connection:
                    group = await connection.scalar(_SHARD, {"org_id": org_id, "count": self.count})
            if len(self._known) >= KNOWN_MAX:
                self._known.clear()
            self._known[org_id] = int(group)
        return self._known[org_id]
