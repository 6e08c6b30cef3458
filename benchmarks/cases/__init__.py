"""The cases, by the names that the command line takes, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.cases.latency import one_connection
from benchmarks.cases.throughput import hot, spread
from benchmarks.judging import Outcome
from benchmarks.workbench import Workbench

CASES: Mapping[str, Callable[[Workbench], Outcome]] = {
    "hot": hot,
    "spread": spread,
    "one": one_connection,
}
