"""The figures of several processes as one: whoever is asked, whoever has died, however."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import psutil
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from external_agents.adapters.telemetry.worker_files import FOLDER_VARIABLE, WorkerFiles, child_exit, settle_estate
from metrics import Figures, figures_of
from serve import eventually

WORKER = """
import sys
from external_agents.adapters.telemetry.prometheus import PrometheusObservability
from external_agents.ports.observability import BatchRecord
from external_agents.testing.builders import make_agent, make_finished_call, principal_of
from external_agents.ports.observability import AdmissionRecord

observability = PrometheusObservability()
invocation = make_finished_call(make_agent())
admission = AdmissionRecord(at=invocation.created_at, principal=principal_of(invocation.org_id), invocation=invocation)
for line in sys.stdin:
    for _ in range(int(line)):
        observability(admission)
        observability(BatchRecord(admissions=1, settlements=0, waiting=2, duration_s=0.5))
    print("done", flush=True)
"""


APP = """
from prometheus_client import Counter

Counter("external_agents_started", "Workers.", registry=None).inc()


def app(environ, start_response):
    start_response("204 No Content", [])
    return []
"""


class Worker:
    """A process that admits as many invocations as it is told to."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env={**os.environ, FOLDER_VARIABLE: str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid

    def admit(self, count: int) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Callable[[], Worker]]:
    started: list[Worker] = []

    def start() -> Worker:
        started.append(Worker(tmp_path))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def read(folder: Path) -> Figures:
    registry = CollectorRegistry()
    registry.register(WorkerFiles(folder))
    return figures_of(generate_latest(registry))


def test_figures_are_summed(tmp_path: Path, worker: Callable[[], Worker]) -> None:
    for count in (3, 4):
        worker().admit(count)
    figures = read(tmp_path)
    assert figures["admissions_total"] == figures["batch_duration_seconds_count"] == 7
    assert figures["batch_duration_seconds_sum"] == 3.5
    assert (figures["invocations_running"], figures["queue_waiting"]) == (7, 4)


def test_the_dead_keep_their_counts_and_lose_their_gauges(tmp_path: Path, worker: Callable[[], Worker]) -> None:
    one, other = worker(), worker()
    one.admit(3)
    other.admit(4)
    one.kill()
    settle_estate(tmp_path, one.pid)
    figures = read(tmp_path)
    assert figures["admissions_total"] == figures["batch_duration_seconds_count"] == 7
    assert [figures["batch_items_bucket", "admissions", bound] for bound in ("0.0", "1.0", "+Inf")] == [0, 7, 7]
    assert (figures["invocations_running"], figures["queue_waiting"]) == (4, 2)


def test_files_do_not_become_more_with_the_dead(tmp_path: Path, worker: Callable[[], Worker]) -> None:
    for _ in range(4):
        one = worker()
        one.admit(2)
        one.kill()
        settle_estate(tmp_path, one.pid)
    left = sorted(file.name for file in tmp_path.iterdir())
    assert left == [
        "counter_ended.db",
        "gate",
        "histogram_ended.db",
        "lock",
    ]
    assert read(tmp_path)["admissions_total"] == 8


def test_a_file_that_never_got_its_size_hurts_nobody(tmp_path: Path, worker: Callable[[], Worker]) -> None:
    """A process that is killed as it makes one leaves it empty, and the library's own reading then fails for ever."""
    worker().admit(3)
    for name in ("counter_1.db", "histogram_1.db", "gauge_livesum_1.db"):
        (tmp_path / name).touch()
    assert read(tmp_path)["admissions_total"] == 3
    settle_estate(tmp_path, 1)
    assert not list(tmp_path.glob("*_1.db"))
    assert read(tmp_path)["admissions_total"] == 3


def test_a_settlement_that_was_broken_off_is_begun_anew(tmp_path: Path, worker: Callable[[], Worker]) -> None:
    one = worker()
    one.admit(3)
    one.kill()
    (tmp_path / "counter_ended.new").write_bytes(b"\xff" * 100)
    settle_estate(tmp_path, one.pid)
    assert read(tmp_path)["admissions_total"] == 3


def test_readers_never_see_an_estate_twice_or_not_at_all(tmp_path: Path, worker: Callable[[], Worker]) -> None:
    dead = [worker() for _ in range(5)]
    for one in dead:
        one.admit(5)
        one.kill()
    settled = threading.Event()

    def keep_reading() -> list[float]:
        seen = []
        while not settled.is_set():
            seen.append(read(tmp_path)["admissions_total"])
        return seen

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(keep_reading) for _ in range(4)]
        try:
            for one in dead:
                settle_estate(tmp_path, one.pid)
        finally:
            settled.set()
    seen = [value for reader in readers for value in reader.result()]
    assert set(seen) == {25}
    assert len(seen) > 10
    assert not list(tmp_path.glob("*_[0-9]*.db"))


def test_new_readers_let_an_estate_be_settled_first(tmp_path: Path, worker: Callable[[], Worker]) -> None:
    one = worker()
    one.admit(3)
    one.kill()
    with ThreadPoolExecutor(2) as pool, (tmp_path / "lock").open("ab") as lock, (tmp_path / "gate").open("ab") as gate:
        fcntl.flock(lock, fcntl.LOCK_SH)
        settling = pool.submit(settle_estate, tmp_path, one.pid, patience_s=20)
        eventually(lambda: not _is_free(gate), 20)
        reading = pool.submit(read, tmp_path)
        with pytest.raises(TimeoutError):
            reading.result(timeout=0.3)
        fcntl.flock(lock, fcntl.LOCK_UN)
        settling.result(timeout=20)
        assert reading.result(timeout=20)["admissions_total"] == 3


class TestTheHookOfGunicorn:
    def test_it_settles(self, tmp_path: Path, worker: Callable[[], Worker], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
        one = worker()
        one.admit(1)
        one.kill()
        child_exit(None, SimpleNamespace(pid=one.pid))
        assert not list(tmp_path.glob(f"*_{one.pid}.db"))

    def test_gunicorn_takes_it_from_the_module(self, tmp_path: Path) -> None:
        (tmp_path / "counting.py").write_text(APP)
        figures = tmp_path / "figures"
        figures.mkdir()
        command = [sys.executable, "-m", "gunicorn", "-c", "python:external_agents.adapters.telemetry.worker_files"]
        command += ["--no-control-socket", "-b", f"unix:{tmp_path}/socket", "-w", "2", "counting:app"]
        log = (tmp_path / "log").open("wb")
        server = subprocess.Popen(command, cwd=tmp_path, stderr=log, env={**os.environ, FOLDER_VARIABLE: str(figures)})
        try:
            eventually(lambda: len(list(figures.glob("counter_*.db"))) == 2, 20)
            assert read(figures)["started_total"] == 2
            [victim, _] = psutil.Process(server.pid).children()
            victim.kill()
            eventually(lambda: read(figures)["started_total"] == 3, 20)
            assert not list(figures.glob(f"*_{victim.pid}.db"))
            assert (figures / "counter_ended.db").exists()
        finally:
            server.terminate()
            server.wait(20)
            log.close()

    def test_what_fails_does_not_end_the_master(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
        (tmp_path / "counter_17.db").write_bytes(b"\x7f" * 4096)
        child_exit(None, SimpleNamespace(pid=17))
        assert "the counts of worker 17 stay in files of their own" in caplog.text
        assert (tmp_path / "counter_17.db").exists()

    def test_without_a_folder_there_is_nothing_to_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
        child_exit(None, SimpleNamespace(pid=17))

    def test_a_worker_whose_files_are_read_for_too_long_is_left_as_it_is(
        self, tmp_path: Path, worker: Callable[[], Worker]
    ) -> None:
        """A reader that has been stopped must not stop the master."""
        one = worker()
        one.admit(2)
        one.kill()
        script = "import fcntl, sys; file = open(sys.argv[1], 'ab'); fcntl.flock(file, fcntl.LOCK_SH); input()"
        with (tmp_path / "lock").open("ab") as lock:
            reader = subprocess.Popen([sys.executable, "-c", script, lock.name], stdin=subprocess.PIPE)
            try:
                eventually(lambda: not _is_free(lock), 20)
                reader.send_signal(signal.SIGSTOP)
                with pytest.raises(TimeoutError):
                    settle_estate(tmp_path, one.pid)
            finally:
                reader.kill()
                reader.communicate()
        figures = read(tmp_path)
        assert (figures["admissions_total"], figures.get("invocations_running")) == (2, None)


def _is_free(lock: IO[bytes]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(lock, fcntl.LOCK_UN)
    return True
