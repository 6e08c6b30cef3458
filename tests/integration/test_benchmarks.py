"""The benchmark's own parts, and a run of it that is as short as can be. No test asserts a time."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

from agents import Agent, Reply
from benchmarks.agent import BODY
from benchmarks.counting import Counted, Expected, count
from benchmarks.estate import furnish
from benchmarks.filling import fill
from benchmarks.load import Load
from benchmarks.processes import HOST, ROOT, BenchmarkError, RunningLoad, Tree, running_agent
from benchmarks.workbench import PAYLOAD, request_text
from external_agents.settings import Settings
from postgres_server import dsn
from serve import eventually

RUN_S = 120.0
GONE_S = 30.0
ENVIRONMENT = {
    "EXTERNAL_AGENTS_EGRESS_ALLOW": "loopback",
    "EXTERNAL_AGENTS_SECRET_KEYS": "k1:MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=",
}


@pytest.fixture
def folder() -> Iterator[Path]:
    """One through which every account can pass, on the way to a database."""
    made = Path(tempfile.mkdtemp(prefix="xa-bench-"))
    made.chmod(0o711)
    yield made
    shutil.rmtree(made)


def benchmark(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "benchmarks", "--folder", str(folder), "--json", str(folder / "results.json")]
    return subprocess.Popen(
        [*argv, "--rounds", "1", "--seconds", "0.5", "--workers", "1", *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


# A machine that does other things too may bring no answer in so short a time; then nothing was measured.
def test_a_short_run_measures_counts_and_leaves_nothing(folder: Path) -> None:
    process = benchmark(folder, "--cases", "hot")
    out, err = process.communicate(timeout=RUN_S)

    results = json.loads((folder / "results.json").read_text())
    assert results["mismatches"] == {"hot": []}, err
    assert process.returncode == (0 if results["succeeded"] else 1), err
    assert [finding["what"].rpartition(", ")[2] for finding in results["findings"]] == ["over naive", "over forward"]
    assert {finding["verdict"] for finding in results["findings"]} <= {"yes", "aim", "no", "not measured"}
    assert [done["variant"] for done in results["rounds"]["hot"]] == ["ours", "naive", "forward"]
    assert all(done["statuses"]["200"] > 0 for done in results["rounds"]["hot"])
    assert "| hot " in out
    assert [path.name for path in folder.iterdir()] == ["results.json"]


@pytest.mark.parametrize(("signum", "once"), [(signal.SIGINT, "load.py"), (signal.SIGTERM, "agent.py")])
def test_an_interrupted_run_leaves_nothing(folder: Path, signum: signal.Signals, once: str) -> None:
    process = benchmark(folder, "--cases", "one", "--seconds", "60")
    try:
        eventually(lambda: any(once in " ".join(_argv(pid)) for pid in Tree(process.pid).pids()), RUN_S)
        started = Tree(process.pid).pids()
        process.send_signal(signum)
        assert process.wait(GONE_S) == 130
        eventually(lambda: not any(map(_lives, started)), GONE_S)
        assert list(folder.iterdir()) == []
    finally:
        process.kill()
        process.communicate()


def test_unknown_cases_are_wrong_usage(folder: Path) -> None:
    process = benchmark(folder, "--cases", "hot,cold")
    _, err = process.communicate(timeout=RUN_S)
    assert process.returncode == 2
    assert "there is no cold; there are hot, " in err


def test_load_and_agent_count_the_same(tmp_path: Path) -> None:
    with running_agent() as agent:
        job = {
            "address": [HOST, agent.port],
            "requests": [request_text("POST", path, "none", PAYLOAD) for path in ("/fast/1", "/fast/2")],
            "connections": 8,
        }
        counted = RunningLoad(tmp_path, {**job, "count": 500}).result()
        assert (counted["answered"], counted["statuses"], counted["broken"]) == (500, {"200": 500}, 0)
        assert agent.requests("/fast/1") + agent.requests("/fast/2") == 500
        assert agent.requests("/fast/1") > 100
        assert agent.requests("/fast/3") == 0

        timed = RunningLoad(tmp_path, {**job, "seconds": 0.3}).result()
        assert 0 < timed["answered"] <= timed["statuses"]["200"] == len(timed["latencies_us"])

        stormed = RunningLoad(tmp_path, {**job, "connections": 50, "each": 2, "at_once": True}).result()
        assert stormed["statuses"] == {"200": 100}

        paced = RunningLoad(tmp_path, {**job, "connections": 1, "pace_s": 0.02, "seconds": 0.5}).result()
        assert 0 < paced["answered"] <= 25

        everything = 500 + timed["statuses"]["200"] + 100 + paced["statuses"]["200"]
        assert agent.requests("/fast/1") + agent.requests("/fast/2") == everything


def test_a_slow_path_takes_its_time_and_a_load_waits_for_it(tmp_path: Path) -> None:
    with running_agent() as agent:
        requests = [request_text("POST", "/slow/1", "none", PAYLOAD)]
        job = {"address": [HOST, agent.port], "requests": requests, "connections": 20, "seconds": 0.1}
        result = RunningLoad(tmp_path, job).result()
    assert result["answered"] == 0
    assert result["statuses"] == {"200": 20}
    assert min(result["latencies_us"]) >= 2_000_000


def test_payload_and_answer_have_200_bytes() -> None:
    assert (len(PAYLOAD), len(BODY)) == (200, 200)
    assert json.loads(BODY)["metadata"] == {"cost": "0.01"}


async def test_a_load_tells_refusals_and_broken_connections_apart(agent_server: Agent) -> None:
    agent_server.answers(Reply(), Reply(503, b'{"why": "full"}'), Reply(raw=b"HTTP/1.1 2", close=True))
    job = {
        "address": [HOST, agent_server.port],
        "requests": [request_text("POST", "/hook", "none", PAYLOAD)],
        "connections": 1,
        "count": 10,
    }
    result = await asyncio.to_thread(Load(job).run)
    assert result["statuses"] == {"200": 1, "503": 1}
    assert result["broken"] == 1
    assert '{"why": "full"}' in result["complaints"][0]


def test_a_load_that_finds_nobody_fails(tmp_path: Path) -> None:
    job = {"address": [HOST, 1], "requests": ["GET / HTTP/1.1\r\n\r\n"], "connections": 1, "count": 1}
    with pytest.raises(BenchmarkError, match="ended with 1"):
        RunningLoad(tmp_path, job).result()


async def test_rows_that_were_filled_in_are_counted_and_what_is_off_is_found(postgres_url: str) -> None:
    settings = Settings.from_env({**ENVIRONMENT, "EXTERNAL_AGENTS_DATABASE_URL": postgres_url})
    estate = await furnish(settings, postgres_url, "http://127.0.0.1:9/", orgs=2, agents_each=2)
    agent = estate.agents[0]
    url = dsn(postgres_url)
    with psycopg.connect(url, autocommit=True) as connection:
        indexes = connection.execute(_INDEXES).fetchall()
        options = connection.execute(_OPTIONS).fetchall()
        since = await fill(url, estate, 2_000, tell=lambda line: None)
        assert connection.execute(_INDEXES).fetchall() == indexes
        assert connection.execute(_OPTIONS).fetchall() == options

        assert count(url) == Counted(rows=2_000, unfinished=0, attempts=1_998, reserved=Decimal(0), accounts_off=0)
        assert count(url, since) == Counted(rows=0, unfinished=0, attempts=0, reserved=Decimal(0), accounts_off=0)
        owners = "SELECT count(DISTINCT org_id), count(DISTINCT external_agent_id) FROM external_agent_invocations"
        assert connection.execute(owners).fetchone() == (2, 4)

        newest = "(SELECT max(id::text)::uuid FROM external_agent_invocations)"
        connection.execute(f"UPDATE external_agent_invocations SET status = 'running' WHERE id = {newest}")
        assert count(url).unfinished == 1
        connection.execute(f"DELETE FROM external_agent_invocations WHERE id = {newest}")
        connection.execute("UPDATE external_agent_budgets SET reserved = 0.05 WHERE agent_id = %s", [agent.id])
        found = list(count(url).mismatches(Expected(acknowledged=2_000, agent_requests=1_998)))
    assert [mismatch.split()[-1] for mismatch in found] == ["there", "attempts", "reserved", "rows"]


_INDEXES = """
    SELECT indexdef FROM pg_indexes WHERE tablename LIKE 'external_agent_invocations%' ORDER BY tablename, indexdef
"""
_OPTIONS = "SELECT relname, reloptions FROM pg_class WHERE relname LIKE 'external_agent_invocations%' ORDER BY relname"


def _argv(pid: int) -> list[Any]:
    try:
        return psutil.Process(pid).cmdline()
    except psutil.NoSuchProcess:
        return []


def _lives(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}") and psutil.pid_exists(pid) and _status(pid) != psutil.STATUS_ZOMBIE


def _status(pid: int) -> str:
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return psutil.STATUS_ZOMBIE
