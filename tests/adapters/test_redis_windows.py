"""The script beside the rule: the same operations on both, the same answers and the same state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import pytest
import redis
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from external_agents.adapters.redis.connection import Command
from external_agents.adapters.redis.windows import (
    SCRIPT,
    SHA,
    Answer,
    Numbers,
    give,
    key_of,
    limits_of,
    numbers_of,
    take,
    with_source,
)
from external_agents.domain.rate_limit import BUCKETS, Limits, RateWindows, Window
from redis_server import RedisServer, script_with_clock

AGENT_ID = UUID("019ab0c5-7a52-7f3e-9c1d-2b8f4a6e0d13")
UNLIMITED: Numbers = (-1, -1, -1)


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis_server.client() as client:
        client.script_load(SCRIPT)
        yield client
        client.script_flush()


class Windows:
    """One agent's windows in Redis, at a time of the test's choosing: a late one, at which no key expires."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.key = key_of("acme", uuid4())
        self.now_us = 4_000_000_000_000_000

    def run(self, command: Command) -> Any:
        source = script_with_clock(b"{%d, %d}" % divmod(self.now_us, 1_000_000))
        return self.client.execute_command("EVAL", source, *command[2:])

    def take(self, places: int, limits: Numbers) -> Answer:
        answer = Answer.of(self.run(take(self.key, places, limits)))
        assert answer.now_s == pytest.approx(self.now_us / 1_000_000, abs=1e-6)
        return answer


LIMITS = st.tuples(*[st.sampled_from([-1, -1, 0, 1, 3, 6, 10, 1_000_000_000])] * 3)


@st.composite
def pauses_us(draw: st.DrawFn) -> int:
    """Of every size: within a bucket, whole buckets, once round the ring, about a window, far beyond it."""
    bucket_us = draw(st.sampled_from([1_200_000, 72_000_000, 1_728_000_000]))
    return draw(
        st.integers(0, bucket_us)
        | st.integers(0, 2 * BUCKETS).map(lambda buckets: buckets * bucket_us)
        | st.integers(-2, 2).map(lambda near: BUCKETS * bucket_us + near)
        | st.sampled_from([bucket_us - 1, 50 * bucket_us - 1, 1000 * bucket_us])
    )


class ScriptAndRule(RuleBasedStateMachine):
    def __init__(self, client: redis.Redis) -> None:
        super().__init__()
        self.redis = Windows(client)
        self.windows = RateWindows()
        self.held: list[Numbers] = []

    @rule(places=st.integers(1, 8), numbers=LIMITS)
    def take(self, places: int, numbers: Numbers) -> None:
        answer = self.redis.take(places, numbers)
        limits, windows = limits_of(numbers), self.windows.advanced(answer.now_s)
        quotas = []
        while len(quotas) < places and windows.refusal(limits, answer.now_s) is None:
            windows = windows.taken()
            quotas.append(windows.quotas(limits, answer.now_s))
            self.held.append(answer.heads)
        assert answer.taken == len(quotas)
        assert answer.heads == windows.heads
        assert answer.quotas_of_places(limits) == quotas
        assert answer.windows == (windows if answer.taken < places else None)
        if quotas:
            self.windows = windows

    @precondition(lambda self: self.held)
    @rule(data=st.data(), places=st.integers(1, 3))
    def give_back(self, data: st.DataObject, places: int) -> None:
        heads = data.draw(st.sampled_from(self.held))
        places = min(places, self.held.count(heads))
        self.redis.run(give(self.redis.key, places, heads))
        for _ in range(places):
            self.held.remove(heads)
            self.windows = self.windows.given_back(heads)

    @rule(pause_us=pauses_us())
    def time_passes(self, pause_us: int) -> None:
        self.redis.now_us += pause_us

    @rule(pause_us=pauses_us())
    def the_clock_is_set_back(self, pause_us: int) -> None:
        self.redis.now_us = max(3_900_000_000_000_000, self.redis.now_us - pause_us)

    @invariant()
    def the_state_is_the_same(self) -> None:
        answer = self.redis.take(0, UNLIMITED)
        assert answer.windows == self.windows.advanced(answer.now_s)
        assert list(answer.used) == [answer.windows[window].used for window in Window]


def test_the_script_does_as_the_rule_says(client: redis.Redis) -> None:
    run_state_machine_as_test(
        lambda: ScriptAndRule(client), settings=settings(max_examples=60, stateful_step_count=30, deadline=None)
    )


@pytest.mark.parametrize(
    "limits",
    [{}, {Window.HOUR: 5}, {Window.MINUTE: 0, Window.DAY: 1_000_000_000}, dict(zip(Window, (1, 2, 3), strict=True))],
)
def test_limits_pass_through_the_command(limits: Limits) -> None:
    assert limits_of(numbers_of(limits)) == limits


def test_the_name_of_the_script_is_the_one_that_redis_gives_it(client: redis.Redis) -> None:
    assert client.script_load(SCRIPT) == SHA


def test_a_key_is_one_hash_tag() -> None:
    """All of what tells agents apart stands between the first brace and the next closing one."""
    key = key_of("acme:eu.1_x", AGENT_ID)
    assert key == "external-agents:rate:{acme:eu.1_x:019ab0c5-7a52-7f3e-9c1d-2b8f4a6e0d13}"


def test_a_key_lives_a_little_over_a_day(client: redis.Redis) -> None:
    """Long enough for its last place to leave the day's window, whatever comes in between."""
    key = key_of("acme", uuid4())
    client.execute_command(*take(key, 1, UNLIMITED))
    day, bucket_s = Window.DAY.seconds, Window.DAY.bucket_s
    left_s = client.ttl(key)
    assert day + bucket_s < left_s <= day + 2 * bucket_s
    answer = Answer.of(client.execute_command(*take(key, 0, UNLIMITED)))
    client.expire(key, 1000)
    client.execute_command(*give(key, 1, answer.heads))
    assert 0 < client.ttl(key) <= 1000, "giving back does not prolong it"
    client.execute_command(*take(key, 1, UNLIMITED))
    assert client.ttl(key) > day


def test_a_refusal_or_a_look_leaves_no_key(client: redis.Redis) -> None:
    key = key_of("acme", uuid4())
    client.execute_command(*take(key, 5, (0, -1, -1)))
    client.execute_command(*take(key, 0, UNLIMITED))
    client.execute_command(*give(key, 1, (1, 1, 1)))
    assert not client.exists(key)


def test_the_state_is_small(client: redis.Redis) -> None:
    """A hundred places in every bucket."""
    windows = Windows(client)
    for window in reversed(Window):
        for _ in range(BUCKETS):
            windows.take(100, UNLIMITED)
            windows.now_us += round(window.bucket_s * 1_000_000)
    assert client.strlen(windows.key) <= 512
    assert client.memory_usage(windows.key) <= 768


def test_the_source_may_be_sent_instead_of_its_name(client: redis.Redis) -> None:
    client.script_flush()
    key = key_of("acme", uuid4())
    with pytest.raises(redis.exceptions.NoScriptError):
        client.execute_command(*take(key, 1, UNLIMITED))
    assert Answer.of(client.execute_command(*with_source(take(key, 1, UNLIMITED)))).taken == 1
    assert Answer.of(client.execute_command(*take(key, 1, UNLIMITED))).taken == 1
