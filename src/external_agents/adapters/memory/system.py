"""The machine's own clock and randomness."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from datetime import UTC, datetime
from uuid import UUID

import uuid_utils

from external_agents.ports.system import Clock, IdSource


class SystemClock(Clock):
    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic_s(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class SystemIds(IdSource):
    """Ids grow within the process even when the machine's clock is set back."""

    def new_id(self) -> UUID:
        return UUID(int=uuid_utils.uuid7().int)

    def new_trace_id(self) -> str:
        return secrets.token_hex(16)

    def jitter(self) -> float:
        return random.random()  # noqa: S311 - spreads retries, keeps no secret
