"""Folders under HOME: what is ours is made and kept private, what is not is left as it is."""

from __future__ import annotations

from pathlib import Path

from external_agents.adapters.postgres.embedded.account import (
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

    Raises:
        EmbeddedPostgresError: HOME cannot be made or used.
    """
    try:
        _make_home(home, account or account_for(server_folder(home) / "data"))
    except OSError as error:
        raise unusable(error) from error


def make_server_folder(home: Path, account: Account | None = None) -> Path:
    """
    Raises:
        EmbeddedPostgresError: It cannot be made or used.
    """
    folder = server_folder(home)
    try:
        account = account or account_for(folder / "data")
        _make_home(home, account)
        folder.mkdir(mode=_mode(account), exist_ok=True)
        _open_up(folder, _mode(account))
    except OSError as error:
        raise unusable(error) from error
    return folder


def unusable(error: OSError) -> EmbeddedPostgresError:
    return EmbeddedPostgresError(
        f"{error.filename}: {error.strerror}. Mend that, or set EXTERNAL_AGENTS_HOME to a folder that can be used."
    )


def _make_home(home: Path, account: Account) -> None:
    home.parent.mkdir(parents=True, exist_ok=True)
    if home.is_dir() and home != SYSTEM_HOME:
        return
    home.mkdir(mode=_mode(account), exist_ok=True)
    _open_up(home, _mode(account))


def _mode(account: Account) -> int:
    return PASSABLE if account.kind == "account" else PRIVATE


def _open_up(folder: Path, mode: int) -> None:
    present = folder.stat().st_mode
    if present & mode != mode:
        folder.chmod(present & 0o7777 | mode)
