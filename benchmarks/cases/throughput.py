"""How many calls a second, and what is left of it when the calls are spread over many."""

from __future__ import annotations

from benchmarks.judging import Bound, Finding, Outcome
from benchmarks.workbench import Variant, Workbench, interleaved, outcome

CONNECTIONS = 64
ORGS = 50
AGENTS_EACH = 20


def hot(bench: Workbench) -> Outcome:
    """One busy agent with a budget and three windows, over the same row by row, and over bare forwarding."""
    with bench.ours() as ours, bench.naive() as naive, bench.forward() as forward:
        interleaved(bench, ours, naive, forward, connections=CONNECTIONS)
        bench.profile(ours, connections=CONNECTIONS)
        what = f"{CONNECTIONS} connections, one hot agent"
        findings = [
            ratio("hot", f"{what}, over naive", ours, naive, Bound(floor=12, aim=18)),
            ratio("hot", f"{what}, over forward", ours, forward, Bound(floor=0.30, aim=0.50)),
        ]
        return outcome(findings, ours, naive, forward)


def spread(bench: Workbench) -> Outcome:
    """The same over 1,000 agents in 50 organisations."""
    with bench.ours() as one, bench.ours(orgs=ORGS, agents_each=AGENTS_EACH) as many:
        one.name, many.name = "one agent", "many agents"
        interleaved(bench, many, one, connections=CONNECTIONS)
        bench.profile(many, connections=CONNECTIONS)
        what = f"{ORGS * AGENTS_EACH:,} agents in {ORGS} organisations, over one"
        return outcome([ratio("spread", what, many, one, Bound(floor=0.80, aim=0.95))], many, one)


def ratio(case: str, what: str, ours: Variant, baseline: Variant, bound: Bound, note: str = "") -> Finding:
    """Of the medians of the rates."""
    return Finding(
        case=case,
        what=what,
        ours=f"{ours.rate:,.0f}/s",
        baseline=f"{baseline.rate:,.0f}/s",
        figure=ours.rate / baseline.rate,
        bound=bound,
        note=note,
    )
