"""The script beside the rule: the same operations on both, the same answers and the same state."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID, uuid4

import pytest
import redis
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

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
from external_agents.domain.rate_limit import BUCKETS, Limits, RateWindows, Window, WindowCount
from redis_server import AGE, RedisServer

AGENT_ID = UUID("019ab0c5-7a52-7f3e-9c1d-2b8f4a6e0d13")
UNLIMITED: Numbers = (-1, -1, -1)


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis_server.client() as client:
        client.script_load(SCRIPT)
        yield client


def aged(count: WindowCount, step: int) -> WindowCount:
    """The same so many buckets earlier."""
    counts = [0] * BUCKETS
    for bucket in range(count.head - BUCKETS + 1, count.head + 1):
        counts[(bucket - step) % BUCKETS] = count.counts[bucket % BUCKETS]
    return WindowCount(count.head - step, tuple(counts))


LIMITS = st.tuples(*[st.sampled_from([-1, -1, 0, 1, 3, 6, 10, 1_000_000_000])] * 3)
STEPS = st.tuples(*[st.integers(0, 4) | st.integers(48, 53) | st.sampled_from([0, BUCKETS, 200])] * 3)


class ScriptAndRule(RuleBasedStateMachine):
    """Redis's clock is the clock of both; what it does not do by itself, the state is moved for."""

    def __init__(self, client: redis.Redis) -> None:
        super().__init__()
        self.client = client
        self.age = client.register_script(AGE)

    @initialize()
    def begin(self) -> None:
        self.key = key_of("acme", uuid4())
        self.windows = RateWindows()
        self.held: list[tuple[int, ...]] = []

    @rule(places=st.integers(1, 8), numbers=LIMITS)
    def take(self, places: int, numbers: Numbers) -> None:
        answer = Answer.of(self.client.execute_command(*take(self.key, places, numbers)))
        limits, windows = limits_of(numbers), self.windows.advanced(answer.now_s)
        quotas = []
        while len(quotas) < places and windows.refusal(limits, answer.now_s) is None:
            windows = windows.taken()
            quotas.append(windows.quotas(limits, answer.now_s))
            self.held.append(windows.heads)
        assert answer.taken == len(quotas)
        assert answer.heads == windows.heads
        assert answer.quotas_of_places(limits) == quotas
        assert answer.windows == (windows if answer.taken < places else None)
        if quotas:
            self.windows = windows

    @precondition(lambda self: self.held)
    @rule(data=st.data(), places=st.integers(1, 3))
    def give_back(self, data: st.DataObject, places: int) -> None:
        heads = data.draw(st.sampled_from(sorted(set(self.held))))
        places = min(places, self.held.count(heads))
        self.client.execute_command(*give(self.key, places, heads))  # type: ignore[arg-type]
        for _ in range(places):
            self.held.remove(heads)
            self.windows = self.windows.given_back(heads)

    @rule(steps=STEPS)
    def time_passes(self, steps: Numbers) -> None:
        self.move(steps)

    @rule(steps=st.tuples(*[st.integers(0, 60)] * 3))
    def the_clock_is_set_back(self, steps: Numbers) -> None:
        self.move((-steps[0], -steps[1], -steps[2]))

    @invariant()
    def the_state_is_the_same(self) -> None:
        if not hasattr(self, "key"):
            return
        answer = Answer.of(self.client.execute_command(*take(self.key, 0, UNLIMITED)))
        assert answer.windows == self.windows.advanced(answer.now_s)
        assert list(answer.used) == [answer.windows[window].used for window in Window]

    def move(self, steps: Numbers) -> None:
        if self.client.exists(self.key):
            self.age(keys=[self.key], args=steps)
            moved = (aged(self.windows[window], step) for window, step in zip(Window, steps, strict=True))
            self.windows = RateWindows(*moved)
            self.held = [tuple(head - step for head, step in zip(heads, steps, strict=True)) for heads in self.held]


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
    key = key_of("acme", uuid4())
    age = client.register_script(AGE)
    for _ in range(BUCKETS):
        client.execute_command(*take(key, 100, UNLIMITED))
        age(keys=[key], args=[1, 1, 1])
    assert client.strlen(key) <= 3 * 5 + 3 * BUCKETS + 3
    assert client.memory_usage(key) <= 512


def test_the_source_may_be_sent_instead_of_its_name(client: redis.Redis) -> None:
    client.script_flush()
    key = key_of("acme", uuid4())
    with pytest.raises(redis.exceptions.NoScriptError):
        client.execute_command(*take(key, 1, UNLIMITED))
    assert Answer.of(client.execute_command(*with_source(take(key, 1, UNLIMITED)))).taken == 1
    assert Answer.of(client.execute_command(*take(key, 1, UNLIMITED))).taken == 1
