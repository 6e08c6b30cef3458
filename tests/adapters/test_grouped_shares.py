"""What a flood leaves to others, and that nobody pays for it where there is none."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from external_agents.adapters.postgres.grouped.batch import Admitting, Settling
from external_agents.adapters.postgres.grouped.lines import BATCH_MAX, Lines
from external_agents.adapters.postgres.grouped.shares import FLOOD_SHARE, THERE_FOR_S
from external_agents.domain.agent import ExternalAgent
from external_agents.testing.builders import make_agent, make_finished_call, make_request
from grouped import lane_of


def put(lines: Lines, agent: ExternalAgent, count: int, *, at_s: float = 100.0, settle: bool = False) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(count):
        if settle:
            lines.put(Settling(make_finished_call(agent), loop.create_future(), at_s))
        else:
            lines.put(Admitting(make_request(agent), loop.create_future(), at_s))


def shares(items: list[Admitting] | list[Settling]) -> Counter[tuple[str, int]]:
    return Counter(item.lane for item in items)


@pytest.mark.parametrize("settle", [False, True])
@pytest.mark.parametrize("org_id", ["the-same", "another"])
async def test_a_flood_has_a_share_while_another_agent_is_there(org_id: str, settle: bool) -> None:
    flooded, other = make_agent(org_id="the-same"), make_agent(org_id=org_id)
    lines = Lines()
    put(lines, flooded, 200, settle=settle)
    put(lines, other, 2, settle=settle)
    batch = lines.next_batch()
    items = batch.settlings if settle else batch.admittings
    assert shares(items) == {lane_of(flooded): FLOOD_SHARE, lane_of(other): 2}
    assert shares(items[:4]) == {lane_of(flooded): 2, lane_of(other): 2}
    assert len(lines) == 202 - len(items)


async def test_each_kind_has_its_share() -> None:
    flooded, other = make_agent(), make_agent(org_id="another")
    lines = Lines()
    put(lines, flooded, 100)
    put(lines, flooded, 100, settle=True)
    put(lines, other, 1)
    batch = lines.next_batch()
    assert (len(batch.settlings), len(batch.admittings)) == (FLOOD_SHARE, FLOOD_SHARE + 1)


async def test_an_organisation_floods_with_many_agents_too() -> None:
    flooding = [make_agent(org_id="flooding") for _ in range(20)]
    other = make_agent(org_id="another")
    lines = Lines()
    for agent in flooding:
        put(lines, agent, 10)
    put(lines, other, 1)
    assert Counter(item.lane[0] for item in lines.next_batch().admittings) == {"flooding": FLOOD_SHARE, "another": 1}


@pytest.mark.parametrize("org_ids", [["one"], ["one", "two"], ["one", "one"], [f"org-{n}" for n in range(50)]])
async def test_those_who_are_equally_busy_fill_a_batch(org_ids: list[str]) -> None:
    lines = Lines()
    for org_id in org_ids:
        put(lines, make_agent(org_id=org_id), 400 // len(org_ids))
    assert len(lines.next_batch().admittings) == BATCH_MAX


async def test_who_was_there_lately_need_not_wait_now() -> None:
    flooded, other = make_agent(), make_agent(org_id="another")
    lines = Lines()
    put(lines, other, 1)
    lines.next_batch()
    put(lines, flooded, 200, at_s=100.0 + THERE_FOR_S)
    assert len(lines.next_batch().admittings) == FLOOD_SHARE
    put(lines, flooded, 1, at_s=100.0 + 2 * THERE_FOR_S)
    assert len(lines.next_batch().admittings) == BATCH_MAX


async def test_who_comes_after_a_long_silence_finds_nobody_there() -> None:
    lines = Lines()
    put(lines, make_agent(org_id="another"), 1)
    lines.next_batch()
    put(lines, make_agent(), 200, at_s=100.0 + 2 * THERE_FOR_S)
    assert len(lines.next_batch().admittings) == BATCH_MAX


async def test_what_a_share_leaves_goes_later_in_its_order() -> None:
    flooded, other = make_agent(), make_agent(org_id="another")
    lines = Lines()
    put(lines, other, 1)
    for number in range(3 * FLOOD_SHARE):
        put(lines, flooded, 1, at_s=100.0 + number / 1000)
    came: list[float] = []
    while lines:
        came += [item.since_s for item in lines.next_batch().admittings if item.lane == lane_of(flooded)]
    assert came == sorted(came)
    assert len(came) == 3 * FLOOD_SHARE


@pytest.mark.parametrize("settle", [False, True])
async def test_what_a_share_leaves_makes_no_batch_hurry(settle: bool) -> None:
    lines = Lines()
    assert lines.enough == BATCH_MAX
    put(lines, make_agent(org_id="another"), 1, settle=settle)
    put(lines, make_agent(), FLOOD_SHARE + 1, settle=settle)
    lines.next_batch()
    assert lines.enough > BATCH_MAX
    lines.next_batch()
    assert lines.enough == BATCH_MAX
