"""Records and requests as metrics, for Prometheus to fetch."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from bisect import bisect_left
from collections import Counter as Counts
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.values import MutexValue, ValueClass

from external_agents.adapters.telemetry import metrics
from external_agents.adapters.telemetry.worker_files import FOLDER_VARIABLE, WorkerFiles
from external_agents.domain.errors import ConfigurationError
from external_agents.domain.invocation import Attempt, ErrorCode, InvocationStatus
from external_agents.ports.observability import (
    AdmissionRecord,
    BatchRecord,
    DecisionRecord,
    InvocationRecord,
    ObservabilityManager,
    Record,
    RecoveryRecord,
)

GATHERED_S = 0.02
"""For so long at most an increment may be missing in what other processes show."""

S = TypeVar("S")


class _Histogram(Histogram):
    """Observes many values at once; the library writes each by itself."""

    def observe_all(self, values: Sequence[float]) -> None:
        self._sum.inc(sum(values))
        for bucket, count in Counts(bisect_left(self._upper_bounds, value) for value in values).items():
            self._buckets[bucket].inc(count)


class PrometheusObservability(ObservabilityManager, Collector):
    """
    Counts what it is told, in the metrics of `adapters.telemetry.metrics`.

    `exposition` tells the figures of this process. With PROMETHEUS_MULTIPROC_DIR in the environment before
    `prometheus_client` is imported, it tells those of all processes that share that folder; one such object a process
    then, for its figures go on where those of the one before it ended. It is also a collector: a host registers it with
    a registry of its own.

    Raises:
        ConfigurationError: The variable names no folder that can be written to.
    """

    def __init__(self) -> None:
        shared = ValueClass is not MutexValue  # The library decided that when it was imported.
        if shared and not os.environ[FOLDER_VARIABLE]:
            raise ConfigurationError(f"{FOLDER_VARIABLE} is empty: unset it, or let it name a folder.")
        registry = CollectorRegistry()
        try:
            self._build(registry)
        except OSError as error:
            raise ConfigurationError(
                f"{FOLDER_VARIABLE} must name a folder that this process can write to: {error.strerror}."
            ) from error
        self._increments = _Increments()
        self._source = WorkerFiles(Path(os.environ[FOLDER_VARIABLE])) if shared else _WithoutCreated(registry)

    def _build(self, registry: CollectorRegistry) -> None:
        self._requests = _counters(metrics.REQUESTS, registry)
        self._request_durations = _histograms(metrics.REQUEST_DURATION, registry)
        self._admissions = _counter(metrics.ADMISSIONS, registry)
        self._refusals = _counters(metrics.REFUSED, registry)
        self._running = _gauge(metrics.RUNNING, registry)
        self._ended = _counters(metrics.ENDED, registry)
        self._attempts = _counters(metrics.ATTEMPTS, registry)
        self._attempt_durations = _histogram(metrics.ATTEMPT_DURATION, registry)
        self._reservations = _counters(metrics.RESERVATIONS, registry)
        self._decisions = _counters(metrics.DECISIONS, registry)
        self._batch_items = _histograms(metrics.BATCH_ITEMS, registry)
        self._batch_durations = _histogram(metrics.BATCH_DURATION, registry)
        self._queue = _gauge(metrics.QUEUE, registry)
        self._errors = _counter(metrics.ERRORS, registry)

    def __call__(self, record: Record) -> None:
        if isinstance(record, InvocationRecord):
            self._invocation(record)
        elif isinstance(record, DecisionRecord):
            self._decision(record)
        elif isinstance(record, AdmissionRecord):
            self._admission(record)
        elif isinstance(record, BatchRecord):
            self._batch(record)
        elif isinstance(record, RecoveryRecord):
            ended = self._ended[InvocationStatus.UNKNOWN, ErrorCode.INTERRUPTED]
            self._increments.add(*[ended] * record.interrupted)

    def request(self, method: str, route: str | None, status: int | None, duration_s: float) -> None:
        """
        Count a request to the API.

        Args:
            method: One of few.
            route: The template that it matched, never the path; None: none.
            status: None: there was no answer.
        """
        path = route or metrics.OTHER
        self._increments.observe(self._request_durations[method, path], duration_s)
        self._increments.add(self._requests[method, path, metrics.NONE if status is None else str(status)])

    @contextmanager
    def counting_errors(self) -> Iterator[None]:
        """For the length of the block, count what is logged with the level error or above, by whatever logger."""
        handler = _ErrorCounter(self._errors.inc)
        logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)
            self._increments.write()

    def collect(self) -> Iterable[Family]:
        self._increments.write()
        return sorted(self._source.collect(), key=lambda family: family.name)

    def exposition(self) -> tuple[str, bytes]:
        """The media type and the text of all figures, in Prometheus's text format; safe to call from any thread."""
        return CONTENT_TYPE_PLAIN_0_0_4, generate_latest(self)

    def _admission(self, record: AdmissionRecord) -> None:
        reserved = [] if record.invocation.reservation is None else [self._reservations["made",]]
        self._increments.add(self._admissions, self._running, *reserved)

    def _invocation(self, record: InvocationRecord) -> None:
        invocation = record.invocation
        if invocation is None:
            reason = record.refusal if record.refusal in metrics.REFUSALS else metrics.OTHER
            self._increments.add(self._refusals[reason,])
            return
        counted = [self._ended[invocation.status, invocation.error_code or metrics.NONE]]
        for attempt in invocation.attempts:
            counted.append(self._attempts[_outcome(attempt),])
            self._increments.observe(self._attempt_durations, attempt.duration_ms / 1000)
        if invocation.reservation is not None:
            counted.append(self._reservations["released" if invocation.cost is None else "charged",])
            if invocation.cost_overrun:
                counted.append(self._reservations["overrun",])
        self._increments.subtract(self._running)
        self._increments.add(*counted)

    def _decision(self, record: DecisionRecord) -> None:
        if not record.filters:
            outcome = "failed" if record.errors else "allowed" if record.allowed else "denied"
            self._increments.add(self._decisions[record.action, outcome])

    def _batch(self, record: BatchRecord) -> None:
        observe = self._increments.observe
        observe(self._batch_items["admissions",], record.admissions)
        observe(self._batch_items["settlements",], record.settlements)
        observe(self._batch_durations, record.duration_s)
        self._queue.set(record.waiting)


class _Increments:
    """
    What is written together, from any thread: in files that processes share, to write one takes longer than all else
    about it.

    Whoever adds does so before looking whether somebody will write, and who writes says so before looking what is
    there, so that nothing is left without a lock around the adding. Those who write take turns: what one of them has
    taken, the next one may count on.
    """

    def __init__(self) -> None:
        self._ups: list[Counter | Gauge] = []
        self._downs: list[Gauge] = []
        self._values: list[tuple[_Histogram, float]] = []
        self._writing: asyncio.AbstractEventLoop | None = None
        self._turn = threading.Lock()

    def add(self, *series: Counter | Gauge) -> None:
        """One to each. It is written soon, by the running event loop; without one at once."""
        self._ups += series
        self._write_soon()

    def subtract(self, series: Gauge) -> None:
        """The same for one less."""
        self._downs.append(series)
        self._write_soon()

    def observe(self, series: _Histogram, value: float) -> None:
        """The same for a value."""
        self._values.append((series, value))
        self._write_soon()

    def write(self) -> None:
        """What is there so far."""
        with self._turn:
            self._writing = None
            for series, count in Counts(_taken(self._ups)).items():
                series.inc(count)
            for gauge, count in Counts(_taken(self._downs)).items():
                gauge.dec(count)
            observed: defaultdict[_Histogram, list[float]] = defaultdict(list)
            for histogram, value in _taken(self._values):
                observed[histogram].append(value)
            for histogram, values in observed.items():
                histogram.observe_all(values)

    def _write_soon(self) -> None:
        if self._writing is not None and not self._writing.is_closed():
            return
        try:
            self._writing = loop = asyncio.get_running_loop()
        except RuntimeError:
            self.write()
        else:
            loop.call_later(GATHERED_S, self.write)


def _taken(items: list[S]) -> list[S]:
    """What was in the list, and nothing that others append meanwhile: each of these steps is one to other threads."""
    count = len(items)
    taken = items[:count]
    del items[:count]
    return taken


class _Series(dict[metrics.Values, S], Generic[S]):
    """The series of a metric by the values of its labels; finding one again costs a look-up."""

    def __init__(self, metric: metrics.Metric, make: Callable[..., S]) -> None:
        super().__init__()
        self._make = make
        for values in metric.series:
            self[values]  # It is there, at 0, before its first event: else a rate misses that.

    def __missing__(self, values: metrics.Values) -> S:
        series = self[values] = self._make(*values)
        return series


class _WithoutCreated(Collector):
    """A registry without the times at which its series were made: they double them, and are lost across processes."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Family]:
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


class _ErrorCounter(logging.Handler):
    def __init__(self, count: Callable[[], None]) -> None:
        super().__init__(logging.ERROR)
        self._count = count

    def emit(self, record: logging.LogRecord) -> None:
        self._count()


def _outcome(attempt: Attempt) -> str:
    if attempt.error is not None:
        return attempt.error
    number = (attempt.status or 0) // 100
    return metrics.STATUS_CLASSES[number - 1] if 1 <= number <= len(metrics.STATUS_CLASSES) else metrics.OTHER


def _counter(metric: metrics.Metric, registry: CollectorRegistry) -> Counter:
    return Counter(metric.name, metric.meaning, metric.labels, registry=registry)


def _counters(metric: metrics.Metric, registry: CollectorRegistry) -> _Series[Counter]:
    return _Series(metric, _counter(metric, registry).labels)


def _gauge(metric: metrics.Metric, registry: CollectorRegistry) -> Gauge:
    """Across processes, the sum over those that live."""
    return Gauge(metric.name, metric.meaning, metric.labels, registry=registry, multiprocess_mode="livesum")


def _histogram(metric: metrics.Metric, registry: CollectorRegistry) -> _Histogram:
    return _Histogram(metric.name, metric.meaning, metric.labels, registry=registry, buckets=metric.buckets)


def _histograms(metric: metrics.Metric, registry: CollectorRegistry) -> _Series[_Histogram]:
    return _Series(metric, _histogram(metric, registry).labels)
