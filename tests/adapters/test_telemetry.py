from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from datetime import UTC, datetime
from decimal import Decimal
from textwrap import dedent
from typing import Any

import attrs
import pytest
import structlog

from external_agents.adapters.telemetry import FanOut, StructlogObservability, configure_logging, logging_config
from external_agents.domain.access import Action
from external_agents.domain.budget import Money
from external_agents.domain.errors import ConfigurationError
from external_agents.domain.invocation import Attempt, ErrorCode, InvocationStatus, Outcome
from external_agents.domain.json_values import JsonText
from external_agents.ports.observability import AdmissionRecord, BatchRecord, DecisionRecord, InvocationRecord, Record
from external_agents.testing.builders import make_agent, make_finished_call, principal_of
from external_agents.testing.fakes import RecordingObservability

NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)
AGENT = make_agent(org_id="acme")
WHO = {"org_id": "acme", "subject": "tester"}
CANARY = "canary-5f3a"


def decision(**fields: Any) -> DecisionRecord:
    known = {"at": NOW, "principal": principal_of("acme"), "action": Action.INVOKE, "agent_id": AGENT.id}
    return DecisionRecord(**{**known, "allowed": True, **fields})


def ended(**fields: Any) -> InvocationRecord:
    invocation = make_finished_call(AGENT, **{"trace_id": "ab" * 16, **fields})
    return InvocationRecord(
        at=NOW, principal=principal_of("acme"), agent_id=AGENT.id, trace_id=invocation.trace_id, invocation=invocation
    )


def event_of(record: Record) -> dict[str, Any]:
    with structlog.testing.capture_logs() as events:
        StructlogObservability()(record)
    [event] = events
    return dict(event)


def test_a_host_without_structlog_gets_its_records_by_logging(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert not structlog.is_configured()
    StructlogObservability()(decision(allowed=False))
    [line] = caplog.records
    assert (line.name, line.getMessage(), line.levelname) == ("external_agents.observability", "decision", "INFO")
    assert vars(line)["org_id"] == "acme"


@pytest.mark.parametrize(
    ("fields", "level"),
    [
        ({"allowed": True}, "debug"),
        ({"allowed": False, "filters": True}, "debug"),
        ({"allowed": False}, "info"),
        ({"allowed": False, "errors": ("overflow",)}, "warning"),
    ],
)
def test_a_decision_is_one_event(fields: dict[str, Any], level: str) -> None:
    shown = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    shown.pop("filters", None)
    assert event_of(decision(policy_ids=("guardrail-invoke",), **fields)) == {
        "event": "decision",
        "log_level": level,
        **WHO,
        "action": "invoke",
        "agent_id": str(AGENT.id),
        "policy_ids": ["guardrail-invoke"],
        "errors": [],
        **shown,
    }


def test_a_decision_on_an_organisation_names_no_agent() -> None:
    assert event_of(decision(action=Action.CREATE, agent_id=None))["agent_id"] is None


@pytest.mark.parametrize(
    ("status", "level"),
    [
        (InvocationStatus.SUCCEEDED, "info"),
        (InvocationStatus.FAILED, "warning"),
        (InvocationStatus.UNKNOWN, "warning"),
    ],
)
def test_an_invocation_is_one_event(status: InvocationStatus, level: str) -> None:
    record = ended(
        status=status,
        error_code=ErrorCode.TIMEOUT,
        attempts=(Attempt.of(Outcome(status=200), NOW, 7),) * 2,
        cost=Money(Decimal("0.050"), "EUR"),
        cost_overrun=True,
        execution_time_ms=15,
    )
    assert record.invocation
    assert event_of(record) == {
        "event": "invocation",
        "log_level": level,
        **WHO,
        "agent_id": str(AGENT.id),
        "trace_id": "ab" * 16,
        "invocation_id": str(record.invocation.id),
        "status": status.value,
        "error_code": "timeout",
        "response_status": 200,
        "attempts": 2,
        "execution_time_ms": 15,
        "cost": "0.05",
        "currency": "EUR",
        "cost_overrun": True,
    }


def test_a_refused_invocation_is_one_event() -> None:
    record = attrs.evolve(ended(), invocation=None, refusal="RateLimited")
    assert event_of(record) == {
        "event": "invocation_refused",
        "log_level": "info",
        **WHO,
        "agent_id": str(AGENT.id),
        "trace_id": "ab" * 16,
        "refusal": "RateLimited",
    }


def test_an_admission_is_no_event() -> None:
    invocation = ended().invocation
    assert invocation
    with structlog.testing.capture_logs() as events:
        StructlogObservability()(AdmissionRecord(at=NOW, principal=principal_of("acme"), invocation=invocation))
    assert events == []


def test_a_batch_is_one_event() -> None:
    batch = {"admissions": 3, "settlements": 2, "waiting": 1, "duration_s": 0.004}
    assert event_of(BatchRecord(**batch)) == {"event": "batch", "log_level": "debug", **batch}


def test_one_observer_that_fails_does_not_silence_the_next(caplog: pytest.LogCaptureFixture) -> None:
    def broken(record: Record) -> None:
        raise RuntimeError("observer")

    first, last = RecordingObservability(), RecordingObservability()
    FanOut(first, broken, last)(decision())
    assert first.records == last.records == [decision()]
    assert "ObservabilityManager failed on a DecisionRecord" in caplog.text


def test_neither_payload_nor_answer_nor_an_agents_words_are_written() -> None:
    record = ended(
        status=InvocationStatus.FAILED,
        request=JsonText(json.dumps(CANARY)),
        response=JsonText(json.dumps(CANARY)),
        error_message=CANARY,
        lineage_hop_id=CANARY,
    )
    assert CANARY not in repr(event_of(record))


def test_levels_and_formats_that_do_not_exist_are_named() -> None:
    with pytest.raises(ConfigurationError, match=r"LOG_FORMAT must be one of console, json, not 'xml'"):
        configure_logging("xml", "info")
    with pytest.raises(ConfigurationError, match=r"LOG_LEVEL must be one of debug, .*, not 'loud'"):
        configure_logging("json", "loud")
    with pytest.raises(ConfigurationError):
        logging_config("JSON ", "info")


def run(script: str, log_format: str | None = "json", level: str = "info", **environment: str) -> str:
    """What a process of its own writes to stderr, which is no terminal, after setting up its logging."""
    done = subprocess.run(
        [sys.executable, "-c", _with_logging(script, log_format, level)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, **environment},
    )
    assert done.stdout == ""
    return done.stderr


def _with_logging(script: str, log_format: str | None, level: str) -> str:
    head = f"""
        import logging, warnings, structlog
        from external_agents.adapters.telemetry import configure_logging
        configure_logging({log_format!r}, {level!r})
        """
    return dedent(head) + dedent(script)


def lines(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def test_every_line_takes_one_pipeline() -> None:
    written = lines(
        run(
            """
            logging.getLogger("gunicorn.error").addHandler(logging.StreamHandler())
            logging.getLogger("gunicorn.error").propagate = False
            configure_logging("json", "info")
            structlog.contextvars.bind_contextvars(request_id="r-1", trace_id="t-1")
            structlog.get_logger("ours").info("started", port=8080)
            logging.getLogger("theirs").warning("%s of %d", "one", 2)
            logging.getLogger("gunicorn.error").info("booted")
            logging.getLogger("alembic.runtime.migration").warning("upgraded")
            logging.getLogger("asyncio").error("never retrieved")
            warnings.warn("old")
            """
        )
    )
    assert [(line["logger"], line["level"], line["event"]) for line in written[:5]] == [
        ("ours", "info", "started"),
        ("theirs", "warning", "one of 2"),
        ("gunicorn.error", "info", "booted"),
        ("alembic.runtime.migration", "warning", "upgraded"),
        ("asyncio", "error", "never retrieved"),
    ]
    assert written[0]["port"] == 8080
    assert written[5]["logger"] == "py.warnings"
    assert len(written) == 6
    for line in written:
        assert (line["request_id"], line["trace_id"]) == ("r-1", "t-1")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line["timestamp"])


def test_a_records_own_trace_id_goes_before_the_requests() -> None:
    [line] = lines(
        run(
            """
            structlog.contextvars.bind_contextvars(trace_id="t-1")
            structlog.get_logger().info("invocation", trace_id="t-2")
            """
        )
    )
    assert line["trace_id"] == "t-2"


def test_levels_hold_for_both_worlds() -> None:
    script = """
        for log in (structlog.get_logger("ours"), logging.getLogger("theirs")):
            for level in ("debug", "info", "warning", "error", "critical"):
                getattr(log, level)(level)
        """
    for level, count in [("debug", 5), ("INFO", 4), ("warning", 3), ("error", 2), ("critical", 1)]:
        assert len(lines(run(script, level=level))) == 2 * count


def test_libraries_that_would_tell_secrets_are_kept_short() -> None:
    written = lines(
        run(
            """
            for name in ("httpx", "httpcore.http11", "sqlalchemy.engine", "aiohttp.client", "psycopg.pool"):
                logging.getLogger(name).debug("Authorization: Bearer x")
                logging.getLogger(name).info("POST https://example.com/bot<token>")
                logging.getLogger(name).warning("slow")
            """,
            level="debug",
        )
    )
    assert [line["event"] for line in written] == ["slow"] * 5


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_exceptions_are_written_without_local_variables(log_format: str) -> None:
    written = run(
        f"""
        def call(word):
            password = word[::-1]
            raise KeyError("missing")
        for log in (structlog.get_logger("ours"), logging.getLogger("theirs")):
            try:
                call("{CANARY[::-1]}")
            except KeyError:
                log.exception("failed")
        """,
        log_format,
    )
    assert written.count("KeyError: 'missing'") == 2
    assert CANARY not in written
    if log_format == "json":
        assert all(line["exception"].startswith("Traceback") for line in lines(written))


def test_whatever_is_logged_is_one_json_object_a_line() -> None:
    written = lines(
        run(
            r"""
            log = structlog.get_logger()
            log.info("a\nb", text="\ud800", number=1 << 80)
            log.info("c", what=object(), when={1: b"x"})
            log.info("d", nothing=float("nan"))
            """
        )
    )
    assert [line["event"] for line in written] == ["a\nb", "c", "d"]
    assert written[0]["number"] == 1 << 80


def test_no_input_steers_the_console() -> None:
    written = run(
        r"""
        structlog.get_logger().warning("a\x1b[2Jb", subject="c\x1b[2Jd\re")
        logging.getLogger("theirs").warning("f\x1b[2Jg\x9bh")
        """,
        "console",
    )
    assert written.count(r"\x1b[2J") == 3
    assert not set(written) & set("\x1b\r\x9b")


@pytest.mark.parametrize(
    ("environment", "terminal", "expected"),
    [({}, False, "json"), ({}, True, "colours"), ({"NO_COLOR": "1"}, True, "plain")],
)
def test_people_get_a_console_and_programs_get_json(environment: dict[str, str], terminal: bool, expected: str) -> None:
    script = 'structlog.get_logger("ours").info("started", port=8080)'
    written = _on_a_terminal(script, environment) if terminal else run(script, None)
    if expected == "json":
        assert lines(written)[0]["port"] == 8080
    else:
        assert ("\x1b[" in written) == (expected == "colours")
        assert re.search(r"port\S*=\S*8080", written)


def _on_a_terminal(script: str, environment: dict[str, str]) -> str:
    ours, theirs = pty.openpty()
    kept = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "FORCE_COLOR"}}
    try:
        subprocess.run(
            [sys.executable, "-c", _with_logging(script, None, "info")],
            stderr=theirs,
            timeout=60,
            check=True,
            env={**kept, **environment},
        )
        os.close(theirs)
        return os.read(ours, 65536).decode()
    finally:
        os.close(ours)
