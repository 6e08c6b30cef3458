"""On what a run was made."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

from benchmarks.processes import ROOT
from benchmarks.workbench import Workbench

IDLE_LOAD = 0.3
"""Runnable processes a core, over the last minute, up to which a machine counts as idle."""


def facts(bench: Workbench) -> dict[str, str]:
    with bench.connect() as connection:
        server_version = connection.execute("SHOW server_version").fetchone()
    return {
        "cores": f"{len(os.sched_getaffinity(0))} x {_cpu_model()}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "postgresql": str(server_version and server_version[0]),
        "gunicorn": version("gunicorn"),
        "aiohttp": version("aiohttp"),
        "falcon": version("falcon"),
        "commit": _commit(),
        "workers": str(bench.plan.workers),
        "rounds": f"{bench.plan.rounds} of {bench.plan.seconds:g} s",
        "load average": " ".join(f"{average:.2f}" for average in os.getloadavg()),
    }


def busy_note() -> str | None:
    """What to say when something else is running; None on an idle machine."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load <= IDLE_LOAD * cores:
        return None
    return f"The machine was not idle when this began (load average {load:.2f} on {cores} cores): mistrust the figures."


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD") or "unknown"
    return f"{commit} and changes" if git("status", "--porcelain") else commit
