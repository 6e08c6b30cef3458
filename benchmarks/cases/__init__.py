"""The cases, by the names that the command line takes, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.cases.fairness import fairness
from benchmarks.cases.latency import one_connection
from benchmarks.cases.rows import full_table, row_size
from benchmarks.cases.storm import storm
from benchmarks.cases.throughput import hot, redis, roles, spread
from benchmarks.judging import Outcome
from benchmarks.workbench import Workbench

CASES: Mapping[str, Callable[[Workbench], Outcome]] = {
    "hot": hot,
    "spread": spread,
    "redis": redis,
    "roles": roles,
    "one": one_connection,
    "storm": storm,
    "fairness": fairness,
    "size": row_size,
    "rows": full_table,
}
