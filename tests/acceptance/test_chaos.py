"""A short run of the crash harness, and that it catches what it is there for. `nox -s chaos` is the long one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from serve import eventually, home_folder

ROOT = Path(__file__).parents[2]
RUN_S = 300.0
START_S = 90.0
GONE_WITHIN_S = 30.0
QUICK = ("--short", "--duration", "10", "--invocations", "100", "--pauses", "0", "--database-crashes", "0")
CLAIM = (
    r"^(?P<invocations>\d+) invocations, 1 kills, 1 database crashes, 1 pauses: "
    r"0 lost, 0 sent twice by recovery, 0 overspent, 0 over-admitted$"
)

pytestmark = pytest.mark.xdist_group("chaos")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where the account that PostgreSQL may run under gets, too."""
    with home_folder() as path:
        path.mkdir(mode=0o711)
        yield path


def test_nothing_is_lost_sent_twice_overspent_or_over_admitted_when_everything_crashes(folder: Path) -> None:
    with chaos(folder, "--short", "--seed", "4711") as run:
        said, _ = run.communicate(timeout=RUN_S)
    claim = re.search(CLAIM, said, re.MULTILINE)
    assert claim is not None, said
    assert int(claim["invocations"]) >= 300
    assert run.returncode == 0, said
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("control", ["resending", "answering-first"])
def test_a_broken_guard_is_caught(folder: Path, control: str) -> None:
    with chaos(folder, *QUICK, "--kills", "2", "--seed", "1", "--control", control) as run:
        said, _ = run.communicate(timeout=RUN_S)
    assert run.returncode == 0, said
    assert f"the broken guard '{control}' was caught" in said


def test_no_process_stays_when_a_run_is_killed(folder: Path) -> None:
    with chaos(folder, "--short") as run:
        assert run.stdout is not None
        assert any("the load begins" in line for line in run.stdout)
        assert len(processes_of(folder)) > 10
        run.kill()
        run.wait()
        eventually(lambda: not processes_of(folder), GONE_WITHIN_S)


@contextmanager
def chaos(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`python -m chaos`, with its files under `folder`; gone afterwards."""
    with subprocess.Popen(
        [sys.executable, "-m", "chaos", *arguments],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as run:
        try:
            yield run
        finally:
            run.kill()


def processes_of(folder: Path) -> list[int]:
    """Whatever a run with its files there has started."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            traces = [process.environ().get("CHAOS_INSTANCES", ""), process.cwd(), *process.cmdline()]
            if any(str(folder) in trace for trace in traces) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found
