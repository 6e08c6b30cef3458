"""Killing and stopping, when the plan says so."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

from chaos.machines import WATCH_S, Census, Database, Redis, Worker
from chaos.plan import Event

Tell = Callable[[str], None]
Busy = Callable[[], Awaitable[set[int]]]
"""The processes that have invocations running, as far as the database can be asked."""


class Demon:
    """
    Attributes:
        done: How many events of each kind there were.
    """

    def __init__(
        self, seed: int, census: Census, database: Database, redis: Redis | None, busy: Busy, tell: Tell
    ) -> None:
        self._busy = busy
        self._chance = random.Random(f"{seed}/demon")
        self._census = census
        self._database = database
        self._redis = redis
        self._tell = tell
        self.done: Counter[str] = Counter()

    async def carry_out(self, events: Sequence[Event]) -> None:
        """All of them, each at its time; returns when the last one is over."""
        began_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for event in events:
                await asyncio.sleep(began_s + event.at_s - time.monotonic())
                group.create_task(self._one(event))

    async def _one(self, event: Event) -> None:
        match event.kind:
            case "kill":
                await self._kill()
            case "pause":
                await self._pause(event.lasts_s)
            case "database":
                self._tell(f"database: kill -9, back in {event.lasts_s:.1f} s")
                await self._database.crash(event.lasts_s)
                self._tell("database: back")
            case "redis":
                assert self._redis is not None
                self._tell(f"redis: kill -9, back in {event.lasts_s:.1f} s")
                await self._redis.crash(event.lasts_s)
                self._tell("redis: back")
        self.done[event.kind] += 1

    async def _kill(self) -> None:
        worker = await self._victim()
        self._census.kill(worker)
        self._tell(f"kill: worker {worker.pid} of server {worker.server}")

    async def _pause(self, lasts_s: float) -> None:
        worker = await self._victim()
        self._census.stop(worker)
        self._tell(f"pause: worker {worker.pid} of server {worker.server} for {lasts_s:.1f} s")
        try:
            await asyncio.sleep(lasts_s)
        finally:
            self._census.resume(worker)
        self._tell(f"pause: worker {worker.pid} goes on")

    async def _victim(self) -> Worker:
        """One that has something to lose, if there is one; and another one is left to go on."""
        while True:
            busy = await self._busy()
            if len(living := self._census.living()) >= 2:
                return self._chance.choice([worker for worker in living if worker.pid in busy] or living)
            await asyncio.sleep(WATCH_S)
