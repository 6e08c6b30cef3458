"""A thousand callers in the same moment, of an agent that takes its time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from benchmarks.cases.throughput import ratio
from benchmarks.judging import Bound, Finding, Outcome
from benchmarks.processes import Tree
from benchmarks.workbench import Round, Variant, Workbench, outcome

CONNECTIONS = 1_000
WARM_UP_CONNECTIONS = 64
ROUNDS_MAX = 3
CALLS_EACH = 4
SAMPLE_EVERY_S = 0.2
MB = 1_000_000


class MemoryPeak:
    """The largest that was seen of a process tree's memory, in bytes."""

    def __init__(self, tree: Tree) -> None:
        self.seen = 0
        self._tree = tree

    @contextmanager
    def watching(self) -> Iterator[None]:
        over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(over,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _watch(self, over: threading.Event) -> None:
        while True:
            self.seen = max(self.seen, self._tree.memory_bytes())
            if over.wait(SAMPLE_EVERY_S):
                return


def storm(bench: Workbench) -> Outcome:
    """1,000 connections opened at once to an agent that takes 2 s: all answered, how fast, and in how much memory."""
    with (
        bench.site(slow=True) as site,
        bench.whole_serve(site) as ours,
        bench.forward(slow=True) as forward,
    ):
        peak = MemoryPeak(ours.server.tree)
        for variant in (ours, forward):
            variant.warm_up(WARM_UP_CONNECTIONS)
        once = _waves(bench, ours, forward, peak, calls_each=1)
        several = _waves(bench, ours, forward, peak, calls_each=CALLS_EACH)
        what = f"{CONNECTIONS:,} connections opened at once, a 2 s agent"
        bound = Bound(floor=0.9, aim=0.98)
        memory = Finding(
            case="storm",
            what=f"{what}, memory without PostgreSQL",
            ours=f"{peak.seen / MB:,.0f} MB",
            figure=peak.seen / MB,
            unit="MB",
            bound=Bound(floor=400, at_most=True),
        )
        findings = [
            ratio("storm", f"{what}, one call each, over forward", *once, bound),
            ratio("storm", f"{what}, {CALLS_EACH} calls each, over forward", *several, None),
            memory,
        ]
        return outcome(findings, ours, forward)


def _waves(
    bench: Workbench, ours: Variant, forward: Variant, peak: MemoryPeak, *, calls_each: int
) -> tuple[list[Round], list[Round]]:
    bench.checkpoint()
    done: tuple[list[Round], list[Round]] = ([], [])
    for _ in range(min(ROUNDS_MAX, bench.plan.rounds)):
        for variant, rounds in zip((ours, forward), done, strict=True):
            with peak.watching() if variant is ours else nullcontext():
                wave = variant.round(connections=CONNECTIONS, each=calls_each, at_once=True)
            rounds.append(wave)
            if (answered := wave.statuses.get("200", 0)) != CONNECTIONS * calls_each:
                variant.faults.append(f"{answered} of {CONNECTIONS * calls_each} calls were answered with 200")
        bench.tell(f"  {calls_each} each: " + ", ".join(f"{rounds[-1].elapsed_s:.2f} s" for rounds in done))
    return done
