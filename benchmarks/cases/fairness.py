"""What a flood on one organisation's agent does to the callers of another's."""

from __future__ import annotations

import time
from collections.abc import Sequence

from benchmarks.judging import Bound, Finding, Outcome, percentile
from benchmarks.workbench import Round, Variant, Workbench, call_of, outcome

FLOOD_CONNECTIONS = 256
CALLERS = 4
PACE_S = 0.2
"""Of each caller, all together 20 calls a second; one alone would wait for itself where an answer takes longer."""
ROUNDS_MAX = 3
ROUND_LENGTHS = 4
"""How much longer a round is than elsewhere: in 180 calls the 99th percentile would be the second slowest."""
LEAD_S = 1.0
"""From the start of a flood to the first call of its victim, and from its last one to the flood's end."""


def fairness(bench: Workbench) -> Outcome:
    """Four callers at 20 requests/s, alone and beside a flood on another organisation's agent, admitted or refused."""
    with bench.site(orgs=2, shut_each=1) as site, bench.ours(site) as ours, bench.forward() as forward:
        flooded, shut, victim = (call_of(agent) for agent in site.estate.agents[:3])
        any_call = forward.requests[0]
        alone, admitted, refused, free, crowded = ([] for _ in range(5))
        for variant in (ours, forward):
            variant.warm_up(FLOOD_CONNECTIONS)
        for number in range(min(ROUNDS_MAX, bench.plan.rounds)):
            alone.append(_called(ours, victim, "alone"))
            admitted.append(_beside(ours, victim, "admitted flood", flooded, ("200", "503")))
            refused.append(_beside(ours, victim, "refused flood", shut, ("429",)))
            free.append(_called(forward, any_call, "alone"))
            crowded.append(_beside(forward, any_call, "flood", any_call, ("200",)))
            bench.tell(
                f"  round {number + 1}: p99 "
                + ", ".join(
                    f"{name} {_p99([rounds[-1]]):.1f} ms"
                    for name, rounds in (("alone", alone), ("beside calls", admitted), ("beside refusals", refused))
                )
            )
        bound = Bound(floor=3, at_most=True)
        what = f"p99 beside {FLOOD_CONNECTIONS} connections"
        findings = [
            _raised(f"{what} on another organisation's agent, over alone", admitted, alone, bound),
            _raised(f"{what} that get 429, over alone", refused, alone, bound),
            _raised(f"{what}, over alone, both through forward", crowded, free, None),
        ]
        return outcome(findings, ours, forward)


def _beside(variant: Variant, call: str, what: str, flood: str, expected: Sequence[str]) -> Round:
    seconds = _round_s(variant) + 2 * LEAD_S
    running = variant.begin(connections=FLOOD_CONNECTIONS, requests=[flood], seconds=seconds)
    time.sleep(LEAD_S)
    done = _called(variant, call, f"beside {what}")
    variant.take(running, expected)
    return done


def _called(variant: Variant, call: str, what: str) -> Round:
    return variant.round(what, connections=CALLERS, requests=[call], pace_s=PACE_S, seconds=_round_s(variant))


def _round_s(variant: Variant) -> float:
    return ROUND_LENGTHS * variant.bench.plan.seconds


def _raised(what: str, beside: Sequence[Round], alone: Sequence[Round], bound: Bound | None) -> Finding:
    worse, better = _p99(beside), _p99(alone)
    return Finding(
        case="fairness",
        what=what,
        ours=f"{worse:.1f} ms",
        baseline=f"{better:.1f} ms",
        figure=worse / better,
        bound=bound,
    )


def _p99(rounds: Sequence[Round]) -> float:
    return percentile([latency_ms for done in rounds for latency_ms in done.latencies_ms], 99)
