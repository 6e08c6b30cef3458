"""Rate limits in Redis."""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, Literal, TypeAlias
from uuid import UUID

import attrs

from external_agents.adapters.redis.connection import WHAT, Command, RedisConnection, Reply, was_not_loaded
from external_agents.adapters.redis.windows import (
    Answer,
    Numbers,
    give,
    key_of,
    limits_of,
    numbers_of,
    take,
    with_source,
)
from external_agents.application.gathering import gather_newcomers
from external_agents.domain.errors import Unavailable
from external_agents.domain.rate_limit import Limits
from external_agents.domain.refusals import RateLimited
from external_agents.ports.rate_limiter import Place, RateLimiter, Standing

WAITING_MAX = 10_000
"""Callers that wait for an answer; more are turned away."""
COMMANDS_MAX = 500
"""In one round trip: some 10 ms of Redis's time."""
GATHERED_MAX = 128
"""Callers for whom a round trip is worth while, whoever may still come."""
WARNING_EVERY_S = 10.0

_log = logging.getLogger(__name__)

_Question: TypeAlias = tuple[Literal["take", "look", "give"], str, Numbers]
"""What is done, the agent's key, and its limits or the heads of the place."""
_Callers: TypeAlias = "list[asyncio.Future[Any]]"


@attrs.define(eq=False)
class _Taken:
    """Where a place was taken, and whether it is still held."""

    key: str
    heads: Numbers
    is_held: bool = True


class RedisRateLimiter(RateLimiter):
    """
    The windows of all processes, by Redis's clock.

    Callers are gathered: those who come while one round trip is under way wait, and go out in the next together with
    those who come while the event loop is busy; all who want the same of one agent as one command, in the order in
    which they came. One who is alone does not wait.

    A call whose answer was lost is not repeated: the places that it may have taken are lost for their window.
    """

    def __init__(self, connection: RedisConnection) -> None:
        """
        Args:
            connection: For this limiter alone, which closes it.
        """
        self._connection = connection
        self._questions: dict[_Question, _Callers] = {}
        self._waiting = 0
        self._together = 0  # In the last round trip.
        self._sender: asyncio.Task[None] | None = None
        self._warned_at_s = float("-inf")

    async def acquire(self, org_id: str, agent_id: UUID, limits: Limits) -> Place:
        self._require_room()
        place: Place = await self._ask(("take", key_of(org_id, agent_id), numbers_of(limits)))
        return place

    async def release(self, place: Place) -> None:
        taken = place.token
        assert isinstance(taken, _Taken), "the place was taken from another limiter"
        if taken.is_held:
            taken.is_held = False
            await self._ask(("give", taken.key, taken.heads))

    async def peek(self, org_id: str, agent_id: UUID, limits: Limits) -> Standing:
        self._require_room()
        standing: Standing = await self._ask(("look", key_of(org_id, agent_id), numbers_of(limits)))
        return standing

    async def aclose(self) -> None:
        """Close the connection. Whoever still waits is told that the limiter is not available."""
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.wait([self._sender])
        await self._connection.aclose()

    def _require_room(self) -> None:
        """Who gives a place back is never turned away: there are no more of them than of places."""
        if self._waiting >= WAITING_MAX:
            raise Unavailable("The rate limiter, which has too much to do,", retry_after_s=1)

    def _ask(self, question: _Question) -> asyncio.Future[Any]:
        caller = asyncio.get_running_loop().create_future()
        self._questions.setdefault(question, []).append(caller)
        self._waiting += 1
        if self._sender is None:
            self._sender = asyncio.create_task(self._send())
        return caller

    async def _send(self) -> None:
        """Round trip after round trip, until nobody waits."""
        batch: list[tuple[_Question, _Callers]] = []
        try:
            while self._questions:
                # A round trip costs this process as much as half of an invocation, and Redis a write to its disk.
                company = max(self._waiting, self._together)
                await gather_newcomers(lambda: self._waiting, others=company - 1, enough=GATHERED_MAX)
                batch = [(question, self._questions.pop(question)) for question in self._next()]
                await self._carry_out(batch)
                self._together = sum(len(callers) for _, callers in batch)
                self._waiting -= self._together
        except Exception:
            _log.exception("the rate limiter failed")
        finally:
            for _, callers in (*batch, *self._questions.items()):
                _refuse(callers)
            self._questions.clear()
            self._waiting, self._sender = 0, None

    def _next(self) -> list[_Question]:
        return list(islice(self._questions, COMMANDS_MAX))

    async def _carry_out(self, batch: Sequence[tuple[_Question, _Callers]]) -> None:
        try:
            replies = await self._replies([_command(question, len(callers)) for question, callers in batch])
        except Unavailable as outage:
            self._warn(outage.__cause__)
            for _, callers in batch:
                _refuse(callers, outage.__cause__)
            return
        for (question, callers), reply in zip(batch, replies, strict=True):
            try:
                self._answer(question, callers, reply)
            except (struct.error, TypeError):
                self._warn(reply)
                _refuse(callers, reply)

    async def _replies(self, commands: Sequence[Command]) -> list[Reply]:
        replies = await self._connection.call(commands)
        if unknown := [number for number, reply in enumerate(replies) if was_not_loaded(reply)]:
            again = await self._connection.call([with_source(commands[number]) for number in unknown])
            for number, reply in zip(unknown, again, strict=True):
                replies[number] = reply
        return replies

    def _answer(self, question: _Question, callers: _Callers, reply: Reply) -> None:
        """
        Raises:
            struct.error, TypeError: It is an error, or no answer at all.
        """
        operation, key, numbers = question
        if operation == "give":
            if not isinstance(reply, int):
                raise TypeError
            _tell(callers, [None] * len(callers))
            return
        answer, limits = Answer.of(reply), limits_of(numbers)
        present = [caller for caller in callers if not caller.done()]
        if operation == "look":
            _tell(present, [_standing(answer, limits)] * len(present))
            return
        quotas = answer.quotas_of_places(limits)
        _tell(present, (Place(quota, _Taken(key, answer.heads)) for quota in quotas))
        _turn_away(present[answer.taken :], answer, limits)
        for _ in quotas[len(present) :]:
            self._ask(("give", key, answer.heads))  # Whoever it was meant for has gone.

    def _warn(self, reason: object) -> None:
        """An outage is told at its beginning and from time to time, not with each call that it meets."""
        now_s = asyncio.get_running_loop().time()
        if now_s - self._warned_at_s >= WARNING_EVERY_S:
            self._warned_at_s = now_s
            _log.warning("Redis does not serve, and nothing is admitted: %s", str(reason) or type(reason).__name__)


def _command(question: _Question, callers: int) -> Command:
    operation, key, numbers = question
    if operation == "give":
        return give(key, callers, numbers)
    return take(key, callers if operation == "take" else 0, numbers)


def _standing(answer: Answer, limits: Limits) -> Standing:
    assert answer.windows is not None
    return Standing(
        answer.windows.quotas(limits, answer.now_s), answer.windows.refusal(limits, answer.now_s) is not None
    )


def _turn_away(callers: _Callers, answer: Answer, limits: Limits) -> None:
    if not callers:
        return
    assert answer.windows is not None
    refusal = answer.windows.refusal(limits, answer.now_s)
    assert refusal is not None, "the script admits what the rule admits"
    (window, retry_after_s), quotas = refusal, answer.windows.quotas(limits, answer.now_s)
    for caller in callers:
        _fail(caller, RateLimited(window.value, retry_after_s, quotas))


def _refuse(callers: _Callers, reason: object = None) -> None:
    for caller in callers:
        outage = Unavailable(WHAT)
        outage.__cause__ = reason if isinstance(reason, Exception) else None
        _fail(caller, outage)


def _tell(callers: _Callers, answers: Iterable[object]) -> None:
    for caller, answer in zip(callers, answers, strict=False):
        if not caller.done():
            caller.set_result(answer)


def _fail(caller: asyncio.Future[Any], error: Exception) -> None:
    if not caller.done():
        caller.set_exception(error)
        caller.exception()  # Marks it as seen: nobody may be waiting.
