"""The queue of group commit beside lists, and what its fairness promises."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from external_agents.adapters.postgres.grouped.fair_queue import FairQueue, Lane, QueueFull

ORGS = ("a", "b", "B", "a.b")
LANES: list[Lane] = [(org_id, number) for org_id in ORGS for number in range(3)]

lanes = st.sampled_from(LANES)


class QueueBesideLists(RuleBasedStateMachine):
    @initialize(capacity=st.integers(1, 60))
    def begin(self, capacity: int) -> None:
        self.capacity = capacity
        self.queue: FairQueue[tuple[Lane, int]] = FairQueue(capacity)
        self.waiting: dict[Lane, list[tuple[int, int]]] = {lane: [] for lane in LANES}
        self.named = 0
        # Whom others have been preferred to since it began to wait, or had its last turn.
        self.passed_over: dict[str, set[str]] = {}
        self.agents_passed_over: dict[Lane, set[Lane]] = {}

    def weight(self, *prefix: object) -> int:
        return sum(weight for lane, own in self.waiting.items() if lane[: len(prefix)] == prefix for _, weight in own)

    @rule(lane=lanes, weight=st.integers(1, 8))
    def put(self, lane: Lane, weight: int) -> None:
        self.named += 1
        free = self.capacity - self.weight()
        has_room = weight + self.weight(lane[0]) + self.weight(*lane) <= free or not self.weight()
        try:
            self.queue.put(lane, (lane, self.named), weight)
        except QueueFull:
            assert not has_room
        else:
            assert has_room
            self.begins_to_wait(lane)
            self.waiting[lane].append((self.named, weight))

    @precondition(lambda self: self.weight())
    @rule()
    def take(self) -> None:
        lane, number = self.queue.take()
        assert self.waiting[lane].pop(0)[0] == number
        self.judge(lane)

    @rule(taken=st.lists(st.tuples(lanes, st.integers(1, 8)), max_size=5))
    def put_back(self, taken: list[tuple[Lane, int]]) -> None:
        """However full it is."""
        for lane, weight in taken:
            self.named += 1
            self.queue.put_back(lane, (lane, self.named), weight)
            self.begins_to_wait(lane)
            self.waiting[lane].insert(0, (self.named, weight))

    @rule(which=st.sets(st.integers(0, 4)), lane=st.none() | lanes)
    def remove(self, which: set[int], lane: Lane | None) -> None:
        removed = self.queue.remove(lambda item: item[1] % 5 in which, lane)
        expected: dict[Lane, list[int]] = {}
        for own_lane, own in self.waiting.items():
            if lane in (None, own_lane):
                expected[own_lane] = [number for number, _ in own if number % 5 in which]
                own[:] = [(number, weight) for number, weight in own if number % 5 not in which]
        found: dict[Lane, list[int]] = {own_lane: [] for own_lane in expected}
        for own_lane, number in removed:
            found[own_lane].append(number)
        assert found == expected
        self.forget_who_left()

    def begins_to_wait(self, lane: Lane) -> None:
        if not self.weight(lane[0]):
            self.passed_over[lane[0]] = set()
        if not self.weight(*lane):
            self.agents_passed_over[lane] = set()

    def judge(self, lane: Lane) -> None:
        """No organisation, and within one no agent, has two turns while another waits for one."""
        org_id = lane[0]
        self.forget_who_left()
        for other, preferred in self.passed_over.items():
            if other != org_id:
                assert org_id not in preferred
                preferred.add(org_id)
        for other_lane, preferred_lanes in self.agents_passed_over.items():
            if other_lane[0] == org_id and other_lane != lane:
                assert lane not in preferred_lanes
                preferred_lanes.add(lane)
        if org_id in self.passed_over:
            self.passed_over[org_id] = set()
        if lane in self.agents_passed_over:
            self.agents_passed_over[lane] = set()

    def forget_who_left(self) -> None:
        self.passed_over = {org: by for org, by in self.passed_over.items() if self.weight(org)}
        self.agents_passed_over = {lane: by for lane, by in self.agents_passed_over.items() if self.weight(*lane)}

    @invariant()
    def it_knows_how_many_wait(self) -> None:
        if hasattr(self, "queue"):
            assert len(self.queue) == sum(len(own) for own in self.waiting.values())
            assert bool(self.queue) == bool(self.weight())

    def teardown(self) -> None:
        if hasattr(self, "queue"):
            while self.queue:
                self.take()
            assert not any(self.waiting.values())
            with pytest.raises(IndexError):
                self.queue.take()


TestQueueBesideLists = QueueBesideLists.TestCase


def filled(queue: FairQueue[str], lane: Lane, weight: int = 1) -> int:
    """How many it took until it was full for this lane."""
    for taken in range(10_000):
        try:
            queue.put(lane, lane[0], weight)
        except QueueFull:
            return taken
    raise AssertionError


@given(floods=st.lists(lanes, min_size=1, max_size=12, unique=True), capacity=st.integers(100, 2000))
def test_another_is_taken_in_time_whatever_floods(floods: list[Lane], capacity: int) -> None:
    """Within one turn of every organisation that waits, times the agents of its own that wait."""
    queue: FairQueue[str] = FairQueue(capacity)
    for lane in floods:
        filled(queue, lane)
    newcomer: Lane = ("newcomer", 9)
    queue.put(newcomer, "it")
    orgs = {lane[0] for lane in floods}
    assert "it" in [queue.take() for _ in range(min(len(queue), len(orgs) + 1))]

    sibling: Lane = (floods[0][0], 99)
    queue.put_back(sibling, "sibling")
    siblings = {lane for lane in floods if lane[0] == sibling[0]}
    assert "sibling" in [queue.take() for _ in range(min(len(queue), len(orgs) * (len(siblings) + 1)))]


def test_one_agents_flood_leaves_room_for_its_siblings_and_one_organisations_for_the_others() -> None:
    queue: FairQueue[str] = FairQueue(9_000)
    assert filled(queue, ("a", 1)) == 3_000
    assert filled(queue, ("a", 2)) == 1_000
    for number in range(3, 40):
        filled(queue, ("a", number))
    assert 4_400 < len(queue) <= 4_500
    others = [filled(queue, (f"org-{number}", number)) for number in range(1, 6)]
    assert min(others) >= 8
    assert len(queue) < 9_000


def test_what_is_heavier_than_all_passes_alone() -> None:
    queue: FairQueue[str] = FairQueue(10)
    queue.put(("a", 1), "whale", 11)
    with pytest.raises(QueueFull):
        queue.put(("b", 1), "fish", 1)
    assert queue.take() == "whale"
    queue.put(("b", 1), "fish", 1)
