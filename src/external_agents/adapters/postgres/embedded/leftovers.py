"""Processes of an earlier server on the same folder: waiting for them, and in the end ending them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from external_agents.adapters.postgres.embedded.file_lock import FileLock

PATIENCE_S = 5.0
"""How long they may take to end by themselves: a clean shutdown, or a backend that has not noticed yet."""
TIMEOUT_S = 30.0
POLL_S = 0.02


def end_leftovers(mark: str, lock: FileLock) -> bool:
    """
    Take the server's lock as soon as the last process of the earlier server has gone; False when that does not happen.

    The caller owns HOME, so these processes have no owner any more: their parent-death signal is on its way, or their
    postmaster was killed. One that computes on regardless is killed after `PATIENCE_S`.
    """
    begin = time.monotonic()
    while not lock.try_acquire():
        waited_s = time.monotonic() - begin
        if waited_s > TIMEOUT_S:
            return False
        if waited_s > PATIENCE_S:
            for pid in _marked(mark):
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)
    return True


def postmaster_on(data: Path) -> int | None:
    """The pid in postmaster.pid, if it is a PostgreSQL on this folder and not whoever got its number since."""
    try:
        pid = int((data / "postmaster.pid").read_text().split("\n", 1)[0])
    except (FileNotFoundError, ValueError):
        return None
    words = _command_line(pid)
    return pid if words and os.path.basename(words[0]) == "postgres" and str(data) in words else None


def _marked(mark: str) -> Iterator[int]:
    """
    The processes of the server that bears this mark as its cluster_name.

    Everybody may read a command line; a process's folder and open files are closed even to root in most containers.
    """
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        words = _command_line(int(entry))
        if not words:
            continue
        is_postmaster = os.path.basename(words[0]) == "postgres" and f"cluster_name={mark}" in words
        if is_postmaster or words[0].startswith(f"postgres: {mark}: "):
            yield int(entry)


def _command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
