"""The private folder of the server's socket: its path must be short, whatever HOME's length (107 bytes in all)."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from external_agents.adapters.postgres.embedded.account import Account

LONGEST_BASE = 40


def make_socket_dir(former: Path | None, name: str, account: Account) -> Path:
    """
    An empty folder that only `account` (and root) can enter: the former one, if it is still that.

    The same name gets the same path, so that a crash leaves at most one empty folder behind. If somebody else sits on
    that path, another one is made.
    """
    path = former or _base() / name
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    if not _is_private(path, {account.owner_uid, os.geteuid()}):
        path = Path(tempfile.mkdtemp(prefix="external-agents-", dir=_base()))
    if account.kind == "account":
        os.chown(path, account.owner_uid, account.owner_gid, follow_symlinks=False)
    # A lock file of a server that was killed names a process id that somebody else may have by now.
    for remains in path.iterdir():
        remains.unlink()
    return path


def remove_socket_dir(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _base() -> Path:
    preferred = Path(tempfile.gettempdir())
    return preferred if len(os.fsencode(preferred)) <= LONGEST_BASE else Path("/tmp")  # noqa: S108


def _is_private(path: Path, owners: set[int]) -> bool:
    status = path.lstat()
    return stat.S_ISDIR(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o700 and status.st_uid in owners
