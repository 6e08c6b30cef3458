"""What a lone caller waits longer than if it called the agent itself."""

from __future__ import annotations

from benchmarks.judging import Bound, Finding, Outcome, percentile
from benchmarks.workbench import Variant, Workbench, interleaved, outcome


def one_connection(bench: Workbench) -> Outcome:
    """One caller, over calling the agent itself."""
    direct = bench.direct()
    with bench.site() as site, bench.ours(site) as ours, bench.forward() as forward:
        interleaved(bench, ours, direct, forward, connections=1)
        bench.profile(ours, connections=1)
        findings = [
            _added(50, ours, direct, Bound(floor=3, aim=2, at_most=True)),
            _added(99, ours, direct, Bound(floor=10, at_most=True)),
            _added(50, forward, direct, None),
        ]
        return outcome(findings, ours, direct, forward)


def _added(per_cent: int, variant: Variant, direct: Variant, bound: Bound | None) -> Finding:
    through, alone = (percentile(one.latencies_ms, per_cent) for one in (variant, direct))
    return Finding(
        case="one",
        what=f"1 connection, p{per_cent} that {variant.name} adds to calling the agent",
        ours=f"{through:.2f} ms",
        baseline=f"{alone:.2f} ms",
        figure=through - alone,
        unit="ms",
        bound=bound,
    )
