"""The callers: what each asked, when, and what it was answered."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from typing import Any
from uuid import UUID

import aiohttp
import attrs

from chaos.machines import WATCH_S, Census
from chaos.plan import Call, Plan

API = "/api/external-agents"
TRIES_MAX = 60
AGAIN_S = 0.7
TWICE, ONCE_MORE, GIVING_UP = 0.1, 0.3, 0.8
"""How often a call with a key is sent twice at once, once more when it is known, and given up when refused."""
EDIT_EVERY_S = 1.5
KEYED_EVERY = 4
"""Every so many clients one sends its calls under a key, until it knows what became of them."""
REPLAYED = "Idempotent-Replayed"


@attrs.frozen(kw_only=True)
class Answer:
    """`status` None: none came."""

    call: Call
    agent_id: UUID
    sent_at: float
    ended_at: float
    status: int | None = None
    document: Mapping[str, Any] | None = None
    replayed: bool = False

    @property
    def invocation(self) -> Mapping[str, Any] | None:
        """As it was told to have ended."""
        if self.document is None:
            return None
        return self.document if self.status == 200 else self.document.get("invocation")

    @property
    def invocation_id(self) -> UUID | None:
        if (invocation := self.invocation) is not None:
            return UUID(invocation["id"])
        found = (self.document or {}).get("invocation_id")
        return None if found is None else UUID(found)


@attrs.frozen(kw_only=True)
class Edit:
    """An agent that was switched on, off, or only changed; `done`: the answer said so."""

    agent_id: UUID
    sent_at: float
    ended_at: float
    change: Mapping[str, Any]
    done: bool


class Callers:
    """
    Many at once, each over a connection of its own to one server, or to the next one when that does not answer.

    Attributes:
        admitted: Answers with a new invocation's id so far.
    """

    def __init__(
        self,
        plan: Plan,
        addresses: list[str],
        keys: Mapping[str, str],
        agent_ids: Mapping[tuple[str, str], UUID],
    ) -> None:
        self._plan = plan
        self._addresses = addresses
        self._keys = keys
        self._agent_ids = agent_ids
        self.answers: list[Answer] = []
        self.admitted = 0
        self.edits: list[Edit] = []
        self._began_s = time.monotonic()
        self._over = asyncio.Event()

    async def call_until(self, over: asyncio.Event) -> None:
        self._over = over
        self._began_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(self._plan.options.clients):
                group.create_task(self._client(number))
            for number, org in enumerate(self._keys):
                group.create_task(self._editor(number, org))

    async def _client(self, number: int) -> None:
        options = self._plan.options
        chance = random.Random(f"{options.seed}/client/{number}")
        mean_s = options.clients / options.calls_per_s
        keyed = number % KEYED_EVERY == 0
        async with _session() as session:
            count = 0
            while not await self._pause(chance.expovariate(1 / mean_s)):
                count += 1
                call = self._plan.call(chance, f"{number}-{count}", time.monotonic() - self._began_s)
                if keyed:
                    await self._until_known(session, attrs.evolve(call, key=f"key {call.name}"), number, chance)
                else:
                    await self._invoke(session, call, self._addresses[number % len(self._addresses)])

    async def _pause(self, seconds: float) -> bool:
        """Whether it is over."""
        try:
            await asyncio.wait_for(self._over.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _until_known(
        self, session: aiohttp.ClientSession, call: Call, number: int, chance: random.Random
    ) -> None:
        """The same key until there is an answer that stays; sometimes twice at once, and sometimes once more."""
        for attempt in range(TRIES_MAX):
            address = self._addresses[(number + attempt) % len(self._addresses)]
            answers = [self._invoke(session, call, address)]
            async with _session() as other:
                if chance.random() < TWICE:
                    answers.append(self._invoke(other, call, address))
                statuses = {answer.status for answer in await asyncio.gather(*answers)}
            if statuses & {200, 502, 504}:
                if chance.random() < ONCE_MORE:
                    await self._invoke(session, call, self._addresses[(number + attempt + 1) % len(self._addresses)])
                return
            if (statuses & {402, 429} and chance.random() < GIVING_UP) or await self._pause(AGAIN_S):
                return

    async def _invoke(self, session: aiohttp.ClientSession, call: Call, address: str) -> Answer:
        agent_id = self._agent_ids[call.agent.org, call.agent.name]
        headers = {"Authorization": f"Bearer {self._keys[call.agent.org]}"}
        if call.key is not None:
            headers["Idempotency-Key"] = call.key
        answer = Answer(call=call, agent_id=agent_id, sent_at=time.time(), ended_at=0.0)
        try:
            async with session.post(
                f"{address}{API}/{agent_id}/invoke",
                json=call.payload,
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=call.patience_s),
            ) as response:
                document = await response.json(content_type=None)
                answer = attrs.evolve(
                    answer, status=response.status, document=document, replayed=REPLAYED in response.headers
                )
        except (aiohttp.ClientError, TimeoutError, ValueError):
            pass
        answer = attrs.evolve(answer, ended_at=time.time())
        self.answers.append(answer)
        self.admitted += answer.invocation_id is not None and not answer.replayed
        return answer

    async def _editor(self, number: int, org: str) -> None:
        """Switches an agent of the organisation on and off, and changes others."""
        chance = random.Random(f"{self._plan.options.seed}/editor/{org}")
        async with _session() as session:
            count = 0
            while not await self._pause(chance.uniform(0.3, 1.7) * EDIT_EVERY_S):
                count += 1
                name = chance.choice(("flapping", "flapping", "open", "minutely"))
                change = {"description": f"edit {count}"}
                if name == "flapping":
                    change["status"] = chance.choice(("inactive", "active", "active"))
                address = self._addresses[(number + count) % len(self._addresses)]
                await self._edit(session, address, org, name, change)
            await self._edit(session, self._addresses[0], org, "flapping", {"status": "active"})

    async def _edit(
        self, session: aiohttp.ClientSession, address: str, org: str, name: str, change: Mapping[str, Any]
    ) -> None:
        agent_id, sent_at, done = self._agent_ids[org, name], time.time(), False
        headers = {"Authorization": f"Bearer {self._keys[org]}"}
        try:
            async with session.patch(f"{address}{API}/{agent_id}", json=change, headers=headers) as response:
                done = response.status == 200
                await response.read()
        except (aiohttp.ClientError, TimeoutError):
            pass
        self.edits.append(Edit(agent_id=agent_id, sent_at=sent_at, ended_at=time.time(), change=change, done=done))


async def register(plan: Plan, address: str, keys: Mapping[str, str], url: str) -> dict[tuple[str, str], UUID]:
    """The agents of the plan; their ids by organisation and name."""
    found = {}
    async with _session() as session:
        for agent in plan.agents:
            headers = {"Authorization": f"Bearer {keys[agent.org]}"}
            async with session.post(f"{address}{API}", json=agent.document(url), headers=headers) as response:
                document = await response.json()
                if response.status != 201:
                    raise RuntimeError(f"{agent.name} could not be registered: {document}")
                found[agent.org, agent.name] = UUID(document["id"])
    return found


async def until_ready(addresses: list[str], census: Census, workers: int, within_s: float) -> None:
    """Until every server answers and has all of its workers."""
    async with asyncio.timeout(within_s), _session() as session:
        for address in addresses:
            while True:
                try:
                    async with session.get(f"{address}/healthz") as response:
                        if response.status == 200:
                            break
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.1)
        while True:
            if len(census.living()) >= workers:
                break
            await asyncio.sleep(WATCH_S)


def _session() -> aiohttp.ClientSession:
    """One connection, kept alive."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=1, keepalive_timeout=60), timeout=aiohttp.ClientTimeout(total=90)
    )
