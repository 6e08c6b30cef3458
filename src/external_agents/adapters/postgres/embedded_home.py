"""Folders under HOME: what is ours is made and kept private, what is not is left as it is."""

from __future__ import annotations

from pathlib import Path

from external_agents.adapters.postgres.embedded_account import (
    SYSTEM_HOME,
    Account,
    EmbeddedPostgresError,
    account_for,
)

PRIVATE = 0o700
PASSABLE = 0o711
"""Another account may pass through, to a folder of its own, and sees nothing on the way."""


def server_folder(home: Path) -> Path:
    return home / "postgres"


def make_home(home: Path, account: Account | None = None) -> None:
    """
    Make HOME if it is not there, for nobody but us; when the server runs as another account, that one may pass through.

    A folder that was there before keeps its permissions, except the system's own default.
    """
    mode = _mode(account or account_for(server_folder(home) / "data"))
    home.parent.mkdir(parents=True, exist_ok=True)
    try:
        home.mkdir(mode=mode)
    except FileExistsError:
        if home != SYSTEM_HOME:
            return
    _open_up(home, mode)


def make_server_folder(home: Path, account: Account | None = None) -> Path:
    account = account or account_for(server_folder(home) / "data")
    make_home(home, account)
    folder = server_folder(home)
    folder.mkdir(mode=_mode(account), exist_ok=True)
    _open_up(folder, _mode(account))
    return folder


def unusable(error: OSError) -> EmbeddedPostgresError:
    return EmbeddedPostgresError(
        f"{error.filename}: {error.strerror}. Mend that, or set EXTERNAL_AGENTS_HOME to a folder that can be used."
    )


def _mode(account: Account) -> int:
    return PASSABLE if account.kind == "account" else PRIVATE


def _open_up(folder: Path, mode: int) -> None:
    present = folder.stat().st_mode
    if present & mode != mode:
        folder.chmod(present & 0o7777 | mode)
