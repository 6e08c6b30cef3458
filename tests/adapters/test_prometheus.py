"""Records and requests as metrics, within one process; `test_worker_files` has several."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from decimal import Decimal
from itertools import product
from pathlib import Path
from typing import Any

import attrs
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from external_agents.adapters.telemetry.metrics import METRICS, REFUSALS, REQUEST_DURATION
from external_agents.adapters.telemetry.prometheus import GATHERED_S, PrometheusObservability
from external_agents.domain import errors, refusals
from external_agents.domain.access import Action
from external_agents.domain.budget import Money
from external_agents.domain.invocation import Attempt, ErrorCode, InvocationStatus, Outcome
from external_agents.ports.observability import (
    AdmissionRecord,
    BatchRecord,
    DecisionRecord,
    InvocationRecord,
    Record,
    RecoveryRecord,
)
from external_agents.testing.builders import make_agent, make_finished_call, principal_of
from metrics import Figures, figures_of

NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)
CENT = Money(Decimal("0.01"), "USD")


def told(*records: Record) -> Figures:
    observability = PrometheusObservability()
    for record in records:
        observability(record)
    return figures_of(observability.exposition()[1])


def admitted(**fields: Any) -> AdmissionRecord:
    return AdmissionRecord(
        at=NOW, principal=principal_of("acme"), invocation=make_finished_call(make_agent(org_id="acme"), **fields)
    )


def ended(org_id: str = "acme", **fields: Any) -> InvocationRecord:
    invocation = make_finished_call(make_agent(org_id=org_id), **fields)
    return InvocationRecord(
        at=NOW,
        principal=principal_of(org_id),
        agent_id=invocation.external_agent_id,
        trace_id=invocation.trace_id,
        invocation=invocation,
    )


def refused(refusal: str) -> InvocationRecord:
    return attrs.evolve(ended(), invocation=None, refusal=refusal)


def decision(**fields: Any) -> DecisionRecord:
    known = {"at": NOW, "principal": principal_of("acme"), "action": Action.INVOKE, "agent_id": None, "allowed": True}
    return DecisionRecord(**{**known, **fields})


def attempts(*outcomes: Outcome, duration_ms: int = 7) -> tuple[Attempt, ...]:
    return tuple(Attempt.of(outcome, NOW, duration_ms) for outcome in outcomes)


def test_all_that_can_be_counted_is_there_from_the_start() -> None:
    shown = {family.name: family for family in text_string_to_metric_families(exposed(PrometheusObservability()))}
    assert list(shown) == sorted(metric.name.removesuffix("_total") for metric in METRICS)
    for metric in METRICS:
        family = shown[metric.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (metric.kind, metric.meaning)
        series = {tuple(sample.labels[label] for label in metric.labels) for sample in family.samples}
        assert series == set(metric.series or ([()] if not metric.labels else []))
        assert all(sample.value == 0 for sample in family.samples)


def exposed(observability: PrometheusObservability) -> str:
    media_type, text = observability.exposition()
    assert media_type == "text/plain; version=0.0.4; charset=utf-8"
    return text.decode()


def test_an_admission_runs_until_its_end() -> None:
    figures = told(admitted(), admitted())
    assert (figures["admissions_total"], figures["invocations_running"]) == (2, 2)
    figures = told(admitted(), admitted(), ended())
    assert (figures["admissions_total"], figures["invocations_running"]) == (2, 1)
    assert figures["invocations_total", "succeeded", "none"] == 1


@pytest.mark.parametrize(
    ("status", "error_code"),
    [
        (InvocationStatus.FAILED, ErrorCode.TIMEOUT),
        (InvocationStatus.FAILED, ErrorCode.HTTP_STATUS),
        (InvocationStatus.UNKNOWN, ErrorCode.INTERRUPTED),
    ],
)
def test_ends_by_status_and_error_code(status: InvocationStatus, error_code: ErrorCode) -> None:
    figures = told(ended(status=status, error_code=error_code))
    assert figures["invocations_total", status.value, error_code.value] == 1
    assert figures.total("invocations_total") == 1


def test_what_recovery_ends_is_counted() -> None:
    figures = told(RecoveryRecord(at=NOW, interrupted=3))
    assert figures["invocations_total", "unknown", "interrupted"] == 3


def test_attempts_by_outcome() -> None:
    figures = told(
        ended(
            attempts=attempts(
                Outcome(error=ErrorCode.TIMEOUT),
                Outcome(error=ErrorCode.HTTP_STATUS, status=503),
                Outcome(error=ErrorCode.HTTP_STATUS, status=504),
                Outcome(error=ErrorCode.HTTP_STATUS, status=302),
                Outcome(error=ErrorCode.HTTP_STATUS, status=999),
                Outcome(error=ErrorCode.RESPONSE_TOO_LARGE, status=200),
                Outcome(status=204),
            )
        )
    )
    counted = {outcome: value for outcome, value in figures.by("attempts_total").items() if value}
    assert counted == {"2xx": 1, "3xx": 1, "5xx": 2, "timeout": 1, "response_too_large": 1, "other": 1}


def test_the_latency_of_an_agent_is_that_of_each_attempt() -> None:
    figures = told(
        ended(attempts=attempts(Outcome(status=503), Outcome(status=200), duration_ms=5)),
        ended(attempts=attempts(Outcome(status=200), duration_ms=30_000)),
        ended(attempts=attempts(Outcome(status=200), duration_ms=30_001)),
    )
    buckets = [figures["attempt_duration_seconds_bucket", bound] for bound in ("0.005", "20.0", "30.0", "+Inf")]
    assert buckets == [2, 2, 3, 4]
    assert figures["attempt_duration_seconds_sum"] == pytest.approx(60.011)


@pytest.mark.parametrize(
    ("fields", "events"),
    [
        ({}, {}),
        ({"cost": CENT}, {}),
        ({"reservation": CENT, "cost": CENT}, {"charged": 1}),
        ({"reservation": CENT}, {"released": 1}),
        ({"reservation": CENT, "cost": CENT, "cost_overrun": True}, {"charged": 1, "overrun": 1}),
    ],
)
def test_reservations_are_charged_or_released(fields: dict[str, Any], events: dict[str, int]) -> None:
    figures = told(ended(**fields))
    assert {event: value for event, value in figures.by("reservations_total").items() if value} == events


def test_reservations_are_made_by_admissions() -> None:
    assert told(admitted(reservation=CENT), admitted())["reservations_total", "made"] == 1


def test_refusals_by_reason() -> None:
    figures = told(refused("RateLimited"), refused("RateLimited"), refused("TheHostsOwn"), refused("Another"))
    assert figures["refusals_total", "RateLimited"] == 2
    assert figures["refusals_total", "other"] == 2
    assert figures.total("invocations_total") == 0
    assert figures["invocations_running"] == 0


def test_every_refusal_of_the_library_has_its_name() -> None:
    known = {**vars(errors), **vars(refusals)}
    kinds = (errors.AgentInactive, errors.Unavailable, refusals.AdmissionRefused)
    raised = {name for name, kind in known.items() if isinstance(kind, type) and issubclass(kind, kinds)}
    raised |= {name for name in known if name.startswith("Idempotency")}
    assert raised - {"AdmissionRefused"} == set(REFUSALS)


def test_decisions_by_action_and_outcome() -> None:
    figures = told(
        decision(),
        decision(allowed=False),
        decision(allowed=False, errors=("overflow",)),
        decision(action=Action.CREATE),
        decision(allowed=False, action=Action.READ, filters=True),
    )
    counted = {key: value for key, value in figures.by("decisions_total").items() if value}
    assert counted == {
        ("invoke", "allowed"): 1,
        ("invoke", "denied"): 1,
        ("invoke", "failed"): 1,
        ("create", "allowed"): 1,
    }


def test_batches() -> None:
    figures = told(
        BatchRecord(admissions=3, settlements=0, waiting=9, duration_s=0.002),
        BatchRecord(admissions=1, settlements=600, waiting=4, duration_s=6.0),
    )
    assert figures["queue_waiting"] == 4
    assert [figures["batch_items_sum", kind] for kind in ("admissions", "settlements")] == [4, 600]
    assert [figures["batch_items_bucket", "admissions", bound] for bound in ("0.0", "1.0", "4.0")] == [0, 1, 2]
    assert [figures["batch_items_bucket", "settlements", bound] for bound in ("0.0", "512.0", "+Inf")] == [1, 1, 2]
    assert figures["batch_duration_seconds_count"] == 2
    assert figures["batch_duration_seconds_bucket", "0.0025"] == 1


def test_requests() -> None:
    observability = PrometheusObservability()
    for status, duration_s in [(200, 0.004), (200, 0.3), (None, 2.0)]:
        observability.request("GET", "/a/{id}", status, duration_s)
    observability.request("other", None, 404, 0.0)
    figures = figures_of(observability.exposition()[1])
    assert figures.by("http_requests_total") == {
        ("GET", "/a/{id}", "200"): 2,
        ("GET", "/a/{id}", "none"): 1,
        ("other", "other", "404"): 1,
    }
    assert figures["http_request_duration_seconds_bucket", "0.5", "GET", "/a/{id}"] == 2
    assert figures["http_request_duration_seconds_count", "GET", "/a/{id}"] == 3


async def test_values_that_are_written_together_are_counted_like_each_by_itself() -> None:
    durations = [0.0, 0.001, 0.0010001, 0.3, 0.3, 1, 120, 121, 1e9]
    observability = PrometheusObservability()
    for duration_s in durations:
        observability.request("GET", "/a/{id}", 200, duration_s)  # The running loop gathers them.
    library = CollectorRegistry()
    series = Histogram("twin", "", registry=library, buckets=REQUEST_DURATION.buckets)
    for duration_s in durations:
        series.observe(duration_s)
    figures = figures_of(observability.exposition()[1])
    for sample in next(iter(library.collect())).samples:
        if not sample.name.endswith("_created"):
            name = sample.name.replace("twin", "http_request_duration_seconds")
            assert figures[name, *sample.labels.values(), "GET", "/a/{id}"] == sample.value


def test_no_series_has_a_tenants_value() -> None:
    def records(org_id: str) -> Iterable[Record]:
        money = Money(Decimal(1), "XQZ")
        yield attrs.evolve(decision(), principal=principal_of(org_id), policy_ids=(org_id,))
        yield attrs.evolve(refused("BudgetExceeded"), principal=principal_of(org_id))
        yield admitted(org_id=org_id, reservation=money, lineage_hop_id=org_id)
        yield ended(org_id, cost=money, reservation=money, error_message=org_id, response_status=777)

    observability = PrometheusObservability()
    for record in records("tenant-0"):
        observability(record)
    before = exposed(observability)
    for number in range(1, 200):
        for record in records(f"tenant-{number}"):
            observability(record)
    after = exposed(observability)
    assert len(before.splitlines()) == len(after.splitlines())
    assert "tenant" not in after
    assert "XQZ" not in after


def test_what_is_logged_as_an_error_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    observability = PrometheusObservability()
    with observability.counting_errors():
        for name, level in product(("external_agents.anything", "asyncio"), (logging.WARNING, logging.ERROR, 50)):
            logging.getLogger(name).log(level, "x")
    logging.getLogger("external_agents").error("later")
    assert figures_of(observability.exposition()[1])["unexpected_errors_total"] == 4


def test_it_joins_a_registry_of_the_hosts() -> None:
    registry, observability = CollectorRegistry(), PrometheusObservability()
    registry.register(observability)
    observability(admitted())
    assert figures_of(generate_latest(registry))["admissions_total"] == 1


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("missing", "must name a folder that this process can write to: No such file or directory."),
        ("file", "must name a folder that this process can write to: Not a directory."),
        ("", "is empty: unset it, or let it name a folder."),
    ],
)
def test_a_folder_that_is_none_is_told(tmp_path: Path, folder: str, message: str) -> None:
    (tmp_path / "file").touch()
    script = """
from external_agents.adapters.telemetry.prometheus import PrometheusObservability
from external_agents.domain.errors import ConfigurationError
try:
    PrometheusObservability()
except ConfigurationError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": folder and str(tmp_path / folder)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"PROMETHEUS_MULTIPROC_DIR {message}\n"


async def test_what_is_gathered_is_written_soon_again_and_again() -> None:
    """Without being asked for: other processes tell it, too."""
    observability = PrometheusObservability()

    def written() -> list[float]:
        samples = [sample for family in observability._source.collect() for sample in family.samples]
        return [sample.value for sample in samples if sample.name == "external_agents_batch_duration_seconds_count"]

    for count in (1.0, 2.0):
        observability(BatchRecord(admissions=1, settlements=0, waiting=0, duration_s=0.002))
        async with asyncio.timeout(10):
            while written() != [count]:  # noqa: ASYNC110 - nobody tells when it is
                await asyncio.sleep(GATHERED_S)
