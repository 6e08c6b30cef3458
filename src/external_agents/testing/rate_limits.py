"""What RateLimiter promises."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import TypeAlias
from uuid import UUID, uuid4

import pytest

from external_agents.domain.rate_limit import Limits, Quota, Window
from external_agents.domain.refusals import RateLimited
from external_agents.ports.rate_limiter import Place, RateLimiter
from external_agents.testing.builders import new_org
from external_agents.testing.stores import PassTime

NewLimiter: TypeAlias = Callable[[], RateLimiter]
"""Opens one more limiter on the same store, as another process would; in memory, where there is one, that one."""

TOLERANCE_S = 5.0
"""What a real clock may go on by while a test runs."""
GENEROUS = {Window.MINUTE: 1_000, Window.HOUR: 1_000, Window.DAY: 1_000}


class Caller:
    """Somebody who invokes one agent, and what came of it."""

    def __init__(self, limiter: RateLimiter, limits: Limits, agent: Caller | None = None) -> None:
        self.limiter = limiter
        self.limits = limits
        self.org_id: str = agent.org_id if agent else new_org()
        self.agent_id: UUID = agent.agent_id if agent else uuid4()

    async def acquire(self) -> Place:
        return await self.limiter.acquire(self.org_id, self.agent_id, self.limits)

    async def is_admitted(self) -> bool:
        try:
            await self.acquire()
        except RateLimited:
            return False
        return True

    async def refused(self) -> RateLimited:
        with pytest.raises(RateLimited) as refusal:
            await self.acquire()
        return refusal.value

    async def used(self) -> dict[Window, int]:
        """What each window counts, whatever the limits."""
        standing = await self.limiter.peek(self.org_id, self.agent_id, GENEROUS)
        return {quota.window: quota.used for quota in standing.quotas.quotas}


def all_windows(count: int) -> dict[Window, int]:
    return dict.fromkeys(Window, count)


class RateLimiterContract:
    """
    For RateLimiter, where time can be made to pass.

    A store with a clock of its own makes time pass by moving what it holds into the past. Moving by whole buckets is
    enough.

    Fixtures:
        new_limiter (NewLimiter): of any scope.
        pass_time (PassTime): for their store.
    """

    @pytest.fixture
    def limiter(self, new_limiter: NewLimiter) -> RateLimiter:
        return new_limiter()

    @pytest.mark.parametrize("window", list(Window))
    async def test_a_window_admits_its_limit(self, limiter: RateLimiter, window: Window) -> None:
        caller = Caller(limiter, {window: 3})
        for used in (1, 2, 3):
            [quota] = (await caller.acquire()).quotas.quotas
            assert (quota.window, quota.limit, quota.used, quota.remaining) == (window, 3, used, 3 - used)
            assert window.seconds - TOLERANCE_S < quota.resets_in_s <= window.seconds * 1.02
        refusal = await caller.refused()
        assert window.seconds - TOLERANCE_S < refusal.retry_after_s <= window.seconds * 1.02 + 1
        [quota] = refusal.quotas.quotas
        assert (quota.window, quota.limit, quota.used) == (window, 3, 3)
        assert str(refusal) == f"The limit of invocations per {window.value} is reached."

    async def test_quotas_stand_in_the_order_of_the_windows(self, limiter: RateLimiter) -> None:
        caller = Caller(limiter, {Window.MINUTE: 2, Window.HOUR: 3, Window.DAY: 4})
        expected = [(Window.MINUTE, 2), (Window.HOUR, 3), (Window.DAY, 4)]
        quotas: list[Sequence[Quota]] = [(await caller.acquire()).quotas.quotas for _ in range(2)]
        quotas.append((await caller.refused()).quotas.quotas)
        quotas.append((await limiter.peek(caller.org_id, caller.agent_id, caller.limits)).quotas.quotas)
        for told in quotas:
            assert [(quota.window, quota.limit) for quota in told] == expected

    async def test_the_windows_are_taken_all_or_none(self, limiter: RateLimiter) -> None:
        caller = Caller(limiter, {Window.MINUTE: 5, Window.HOUR: 5, Window.DAY: 1})
        await caller.acquire()
        for _ in range(3):
            await caller.refused()
        assert await caller.used() == all_windows(1)

    async def test_the_window_that_stands_longest_against_it_is_told(self, limiter: RateLimiter) -> None:
        caller = Caller(limiter, {Window.MINUTE: 1, Window.HOUR: 1, Window.DAY: 9})
        await caller.acquire()
        refusal = await caller.refused()
        assert "hour" in str(refusal)
        assert refusal.retry_after_s > 3_600 - TOLERANCE_S

    @pytest.mark.parametrize("window", list(Window))
    async def test_a_limit_of_zero_admits_none(self, limiter: RateLimiter, window: Window) -> None:
        caller = Caller(limiter, {window: 0})
        assert (await caller.refused()).retry_after_s == window.seconds
        assert (await limiter.peek(caller.org_id, caller.agent_id, caller.limits)).rate_limited
        assert await caller.used() == all_windows(0)

    async def test_no_limit_admits_all_and_tells_nothing(self, limiter: RateLimiter) -> None:
        caller = Caller(limiter, {})
        for _ in range(3):
            assert (await caller.acquire()).quotas.quotas == ()
        standing = await limiter.peek(caller.org_id, caller.agent_id, {})
        assert (standing.quotas.quotas, standing.rate_limited) == ((), False)

    async def test_a_limit_added_later_counts_what_was_taken_before(self, limiter: RateLimiter) -> None:
        unlimited = Caller(limiter, {})
        for _ in range(3):
            await unlimited.acquire()
        caller = Caller(limiter, {Window.MINUTE: 4, Window.DAY: 4}, unlimited)
        assert [quota.used for quota in (await caller.acquire()).quotas.quotas] == [4, 4]
        await caller.refused()
        await unlimited.acquire()

    async def test_a_lowered_limit_counts_what_was_taken_before(self, limiter: RateLimiter) -> None:
        caller = Caller(limiter, {Window.HOUR: 5})
        for _ in range(4):
            await caller.acquire()
        [quota] = (await Caller(limiter, {Window.HOUR: 2}, caller).refused()).quotas.quotas
        assert (quota.limit, quota.used, quota.remaining) == (2, 4, 0)
        await caller.acquire()
        await caller.refused()

    async def test_the_highest_limit(self, limiter: RateLimiter) -> None:
        caller = Caller(limiter, all_windows(1_000_000_000))
        assert {quota.remaining for quota in (await caller.acquire()).quotas.quotas} == {999_999_999}

    async def test_agents_have_windows_of_their_own(self, limiter: RateLimiter) -> None:
        """However much the names of their organisations look like each other, or like a key."""
        agent_ids = uuid4(), uuid4()
        org_id = new_org()
        org_ids = [org_id, f"{org_id}:", f":{org_id}", f"{org_id}.x", f"{org_id}:{agent_ids[0]}", org_id.upper()]
        for _ in range(2):
            agents = [(org_id, agent_id) for org_id in org_ids for agent_id in agent_ids]
            results = await asyncio.gather(
                *(limiter.acquire(org_id, agent_id, {Window.DAY: 2}) for org_id, agent_id in agents)
            )
        assert [quota.used for place in results for quota in place.quotas.quotas] == [2] * len(agents)

    async def test_a_race_admits_exactly_the_limit(self, new_limiter: NewLimiter) -> None:
        """Over several limiters at once, for several agents at once; each place is told its own number."""
        limiters = [new_limiter() for _ in range(4)]
        agents = [Caller(limiters[0], {Window.MINUTE: 37, Window.HOUR: 60}) for _ in range(3)]
        callers = [Caller(limiters[n % 4], agent.limits, agent) for agent in agents for n in range(120)]
        random.Random(1).shuffle(callers)  # noqa: S311 - the same order every time

        results = await asyncio.gather(*(caller.acquire() for caller in callers), return_exceptions=True)
        for agent in agents:
            own = [result for caller, result in zip(callers, results, strict=True) if caller.agent_id == agent.agent_id]
            admitted = [result.quotas.quotas[0].used for result in own if isinstance(result, Place)]
            refused = [result.quotas.quotas[0].used for result in own if isinstance(result, RateLimited)]
            assert sorted(admitted) == list(range(1, 38))
            assert refused == [37] * 83
            assert await agent.used() == all_windows(37)

    async def test_peeking_takes_nothing(self, limiter: RateLimiter) -> None:
        caller = Caller(limiter, {Window.MINUTE: 1})
        for _ in range(3):
            standing = await limiter.peek(caller.org_id, caller.agent_id, caller.limits)
            [quota] = standing.quotas.quotas
            assert (standing.rate_limited, quota.used, quota.resets_in_s) == (False, 0, 0)
        place = await caller.acquire()
        standing = await limiter.peek(caller.org_id, caller.agent_id, caller.limits)
        assert standing.rate_limited
        [quota], [taken] = standing.quotas.quotas, place.quotas.quotas
        assert quota.used == taken.used == 1
        assert quota.resets_in_s == pytest.approx(taken.resets_in_s, abs=TOLERANCE_S)

    async def test_a_place_is_given_back_once(self, limiter: RateLimiter) -> None:
        caller = Caller(limiter, {Window.DAY: 3})
        places = [await caller.acquire() for _ in range(3)]
        await asyncio.gather(*(limiter.release(places[1]) for _ in range(5)))
        await limiter.release(places[1])
        assert await caller.used() == all_windows(2)
        await caller.acquire()
        await caller.refused()

    async def test_places_given_back_while_others_take_them(self, new_limiter: NewLimiter) -> None:
        limiters = [new_limiter() for _ in range(2)]
        caller = Caller(limiters[0], {Window.HOUR: 40})
        places = await asyncio.gather(*(caller.acquire() for _ in range(40)))
        others = [Caller(limiters[n % 2], caller.limits, caller) for n in range(30)]
        releases = [limiters[0].release(place) for place in places[:15]]
        admitted, _ = await asyncio.gather(
            asyncio.gather(*(other.is_admitted() for other in others)), asyncio.gather(*releases)
        )
        assert await caller.used() == all_windows(25 + sum(admitted))
        remaining = 15 - sum(admitted)
        assert [await caller.is_admitted() for _ in range(16)] == [number < remaining for number in range(16)]

    async def test_a_place_is_given_back_where_it_was_taken(self, limiter: RateLimiter, pass_time: PassTime) -> None:
        """Where it no longer counts, there is nothing to give back; another place in the same ring of buckets stays."""
        caller = Caller(limiter, {})
        early = await caller.acquire()
        await pass_time(Window.MINUTE.seconds + 3 * Window.MINUTE.bucket_s)
        late = await caller.acquire()
        await limiter.release(early)
        assert await caller.used() == all_windows(1)
        await limiter.release(late)
        assert await caller.used() == all_windows(0)

    @pytest.mark.parametrize("window", list(Window))
    async def test_a_place_comes_free_after_the_window_and_not_before(
        self, limiter: RateLimiter, pass_time: PassTime, window: Window
    ) -> None:
        caller = Caller(limiter, {window: 2})
        await caller.acquire()
        await pass_time(window.seconds / 2)
        await caller.acquire()
        await pass_time(window.seconds / 2 - window.bucket_s - TOLERANCE_S)
        await caller.refused()
        await pass_time(2 * window.bucket_s + TOLERANCE_S)
        [quota] = (await caller.acquire()).quotas.quotas
        assert quota.used == 2
        await caller.refused()

    @pytest.mark.parametrize("window", list(Window))
    async def test_whoever_waits_as_told_is_admitted(
        self, limiter: RateLimiter, pass_time: PassTime, window: Window
    ) -> None:
        caller = Caller(limiter, {window: 3})
        for _ in range(3):
            await caller.acquire()
            await pass_time(3 * window.bucket_s)
        refusal = await caller.refused()
        assert refusal.retry_after_s < window.seconds - 6 * window.bucket_s
        await pass_time(refusal.retry_after_s - 2 * window.bucket_s - TOLERANCE_S)
        await caller.refused()
        await pass_time(3 * window.bucket_s + TOLERANCE_S)
        await caller.acquire()

    async def test_each_window_has_a_memory_of_its_length(self, limiter: RateLimiter, pass_time: PassTime) -> None:
        caller = Caller(limiter, {})
        for _ in range(2):
            await caller.acquire()
        await pass_time(1.1 * Window.HOUR.seconds)
        await caller.acquire()
        assert await caller.used() == {Window.MINUTE: 1, Window.HOUR: 1, Window.DAY: 3}
        await pass_time(1.1 * Window.DAY.seconds)
        assert await caller.used() == all_windows(0)
        await caller.acquire()
        assert await caller.used() == all_windows(1)

    @pytest.mark.parametrize("window", list(Window))
    async def test_no_stretch_of_a_window_holds_more_than_its_limit(
        self, limiter: RateLimiter, pass_time: PassTime, window: Window
    ) -> None:
        """And a place is had whenever 2 % more than the window would not hold the limit."""
        limit, now_s, admitted_s = 4, 0.0, list[float]()
        caller = Caller(limiter, {window: limit})
        chance = random.Random(window.seconds)  # noqa: S311 - the same walk every time
        # A real clock goes on during the test, and a store may have moved by up to a bucket less than it was told.
        strict_s, late_s = window.seconds - TOLERANCE_S, window.seconds + 2 * window.bucket_s + TOLERANCE_S
        for _ in range(60):
            pause_s = chance.choice([0, 0.5, 3, 17, 30]) * window.bucket_s
            await pass_time(pause_s)
            now_s += pause_s
            for admitted in await asyncio.gather(*(caller.is_admitted() for _ in range(chance.randint(1, 3)))):
                if admitted:
                    admitted_s.append(now_s)
                    assert len([at_s for at_s in admitted_s if now_s - at_s < strict_s]) <= limit
                else:
                    assert len([at_s for at_s in admitted_s if now_s - at_s < late_s]) >= limit
        assert len(admitted_s) > limit
