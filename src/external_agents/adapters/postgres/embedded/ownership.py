"""
Who may use the embedded PostgreSQL.

A server belongs to one process, its owner, and ends with it. Two locks under HOME/postgres keep that safe:

    owner.lock   held by the owner, from before the server's start until after its end
    shared.lock  held by an owner that shares (`serve`), only while its server is up for others; its note is written
                 before it is taken, under owner.lock, so whoever sees it held reads the note of its holder

A command alone owns the server exclusively and never takes shared.lock, so nobody can come to depend on a server that
its command is about to stop. The next command waits for owner.lock. A command beside `serve` sees shared.lock held
and connects. A second `serve` cannot take owner.lock, sees shared.lock held and gives up at once. The kernel drops
both locks with the process; what may then remain of the server is `server`'s concern.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from external_agents.adapters.postgres.embedded.account import Account, EmbeddedPostgresError
from external_agents.adapters.postgres.embedded.file_lock import FileLock, read_lock_note, write_lock_note
from external_agents.adapters.postgres.embedded.home import make_server_folder, server_folder, unusable
from external_agents.adapters.postgres.embedded.server import PORT, EmbeddedPostgres, ready_postmaster, url_of

WAIT_S = 30.0
POLL_S = 0.05
OWNER_LOCK = "owner.lock"
SHARED_LOCK = "shared.lock"


class _Shared(NamedTuple):
    """The note in shared.lock."""

    owner_pid: str
    socket_dir: str


@contextmanager
def owned(home: Path, *, wait_s: float = WAIT_S, account: Account | None = None) -> Iterator[EmbeddedPostgres]:
    """
    A server of one's own for the length of the block, up and running. A command that has HOME to itself is waited for.

    Raises:
        EmbeddedPostgresError: `serve` shares a server on HOME (raised at once), a command kept HOME for `wait_s`
            seconds, or the server did not start.
    """
    lock = _owner_lock(home, account)
    deadline = time.monotonic() + wait_s
    while not _take(lock, home):
        if (server := _shared_server(home)) is not None:
            raise EmbeddedPostgresError(
                f"serve already runs on {home} (pid {server.owner_pid}): stop it, "
                "or set EXTERNAL_AGENTS_HOME to another folder."
            )
        _pause(deadline, home, wait_s)
    with _server(home, lock, account) as own:
        yield own


@contextmanager
def shared(home: Path, server: EmbeddedPostgres) -> Iterator[None]:
    """Let other processes use the server that we own, for the length of the block; it must not stop before."""
    path = server_folder(home) / SHARED_LOCK
    write_lock_note(path, f"{os.getpid()}\n{server.socket_dir}\n")
    lock = FileLock(path)
    deadline = time.monotonic() + WAIT_S
    while not lock.try_acquire():  # somebody is looking whether it is held, which takes a moment
        _pause(deadline, home, WAIT_S)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def attached(home: Path, *, wait_s: float = WAIT_S, account: Account | None = None) -> Iterator[str]:
    """
    The URL of the database for the length of the block: of the server that `serve` shares, else of one of our own.

    Raises:
        EmbeddedPostgresError: Another command kept HOME for `wait_s` seconds, or the server did not start.
    """
    lock = _owner_lock(home, account)
    deadline = time.monotonic() + wait_s
    while True:
        server = _shared_server(home)
        if server is not None and _accepts(home, server):
            yield url_of(server.socket_dir)
            return
        if server is None and _take(lock, home):
            with _server(home, lock, account) as own:
                yield own.url
            return
        _pause(deadline, home, wait_s)


def running_url(home: Path) -> str | None:
    """The URL of the server that a live `serve` shares on HOME, which may be restarting; never starts one."""
    server = _shared_server(home)
    return None if server is None else url_of(server.socket_dir)


@contextmanager
def _server(home: Path, lock: FileLock, account: Account | None) -> Iterator[EmbeddedPostgres]:
    try:
        server = EmbeddedPostgres(home, account=account)
        try:
            server.start()
            yield server
        finally:
            server.stop()
    finally:
        lock.release()


def _owner_lock(home: Path, account: Account | None) -> FileLock:
    return FileLock(make_server_folder(home, account) / OWNER_LOCK)


def _take(lock: FileLock, home: Path) -> bool:
    try:
        if not lock.try_acquire():
            return False
        write_lock_note(server_folder(home) / OWNER_LOCK, str(os.getpid()))
    except OSError as error:
        raise unusable(error) from error
    return True


def _pause(deadline: float, home: Path, wait_s: float) -> None:
    if time.monotonic() > deadline:
        pid = read_lock_note(server_folder(home) / OWNER_LOCK) or "unknown"
        raise EmbeddedPostgresError(
            f"Another process (pid {pid}) has kept the database in {home} for {wait_s:.0f} s: "
            "wait until it has ended, or end it."
        )
    time.sleep(POLL_S)


def _shared_server(home: Path) -> _Shared | None:
    try:
        note = read_lock_note(server_folder(home) / SHARED_LOCK)
    except OSError as error:
        raise unusable(error) from error
    lines = (note or "").splitlines()
    return _Shared(*lines) if len(lines) == 2 else None


def _accepts(home: Path, server: _Shared) -> bool:
    """It listens, and is past its recovery; postmaster.pid alone may be a dead server's."""
    if ready_postmaster(home) is None:
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(f"{server.socket_dir}/.s.PGSQL.{PORT}")
        except OSError:
            return False
    return True
