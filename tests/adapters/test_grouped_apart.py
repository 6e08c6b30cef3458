"""Who goes by itself, for how long, and who goes first."""

from __future__ import annotations

import asyncio

from external_agents.adapters.postgres.grouped.apart import APART_FOR_S, LOCK_WAIT_MAX_S, Apart, Lone
from external_agents.adapters.postgres.grouped.batch import Admitting
from external_agents.domain.agent import ExternalAgent
from external_agents.testing.builders import make_agent, make_request
from grouped import lane_of


def waiting(agent: ExternalAgent, count: int = 1, since_s: float = 0.0) -> list[Admitting]:
    loop = asyncio.get_running_loop()
    return [Admitting(make_request(agent), loop.create_future(), since_s) for _ in range(count)]


def turn(apart: Apart) -> tuple[Lone, list[Admitting]]:
    lone = apart.next_turn()
    return lone, lone.lines.next_batch(lone.batch_max).admittings


async def test_agents_of_a_failed_batch_take_turns_in_its_order() -> None:
    agents = [make_agent() for _ in range(3)]
    items = [item for _ in range(2) for agent in agents for item in waiting(agent)]
    apart = Apart()
    apart.part(items, 0.0)
    assert len(apart) == 3
    for agent in agents:
        lone, own = turn(apart)
        assert lone.lane == lane_of(agent)
        assert own == [item for item in items if item.lane == lone.lane]
        assert apart.went_well(lone, 0.0) == []
        apart.end_turn(lone)
        assert apart.of(lone.lane, 0.0) is None
    assert not apart


async def test_whose_batch_goes_well_takes_what_came_meanwhile_back_to_the_others() -> None:
    agent = make_agent()
    apart = Apart()
    apart.part(waiting(agent), 0.0)
    lone, _ = turn(apart)
    late = waiting(agent, 3)
    for item in late:
        found = apart.of(item.lane, 0.0)
        assert found is lone
        found.lines.put(item)
    assert apart.went_well(lone, 0.0) == late
    apart.end_turn(lone)
    assert not apart


async def test_who_is_at_fault_stays_until_it_has_done_well_for_long_enough() -> None:
    agent = make_agent()
    apart = Apart()
    apart.part(waiting(agent, 5), 0.0)
    lone, own = turn(apart)
    apart.was_at_fault(lone, 1.0, held_up=False)
    lone.lines.put_back(own)
    apart.end_turn(lone)
    sizes = []
    while apart:
        lone, own = turn(apart)
        sizes.append(len(own))
        assert apart.went_well(lone, 2.0) == []
        apart.end_turn(lone)
    assert sizes == [1, 2, 2]
    assert apart.of(lone.lane, 1.0 + APART_FOR_S - 0.1) is lone
    assert apart.of(lone.lane, 1.0 + APART_FOR_S) is None


async def test_who_is_at_fault_and_never_idle_goes_back_too() -> None:
    agent = make_agent()
    apart = Apart()
    apart.part(waiting(agent), 0.0)
    lone, _ = turn(apart)
    apart.was_at_fault(lone, 0.0, held_up=False)
    lone.lines.put_back(waiting(agent, 3))
    apart.end_turn(lone)
    lone, _ = turn(apart)
    assert len(apart.went_well(lone, APART_FOR_S)) == 2
    apart.end_turn(lone)
    assert not apart


async def test_who_is_held_up_waits_longer_each_time_while_others_have_their_turns() -> None:
    stuck, other = make_agent(), make_agent()
    apart = Apart()
    apart.part(waiting(stuck) + waiting(other), 0.0)
    waits = []
    for _ in range(12):
        lone, own = turn(apart)
        if lone.lane == lane_of(stuck):
            waits.append(lone.lock_wait_s)
            apart.was_at_fault(lone, 0.0, held_up=True)
        lone.lines.put_back(own)
        apart.end_turn(lone)
    assert len(waits) == 6
    assert waits == sorted(set(waits))
    assert waits[-1] == LOCK_WAIT_MAX_S


async def test_nothing_is_remembered_of_agents_that_never_come_back() -> None:
    apart = Apart()
    for number in range(50):
        apart.part(waiting(make_agent()), number * APART_FOR_S)
        lone, _ = turn(apart)
        apart.was_at_fault(lone, number * APART_FOR_S, held_up=False)
        apart.end_turn(lone)
    assert len(apart._lones) <= 2


async def test_the_overdue_are_taken_out_of_all() -> None:
    agents = [make_agent() for _ in range(3)]
    apart = Apart()
    old = [item for agent in agents[:2] for item in waiting(agent, 2, since_s=1.0)]
    young = [item for agent in agents[1:] for item in waiting(agent, 2, since_s=5.0)]
    apart.part(old + young, 0.0)
    assert apart.remove(1.0) == old
    assert len(apart) == 2
    # The one of which nothing is left may come again.
    again = waiting(agents[0])
    apart.part(again, 2.0)
    assert len(apart) == 3
    assert apart.remove() == young + again
    assert not apart
