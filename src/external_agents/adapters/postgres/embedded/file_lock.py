"""Locks between processes that the kernel drops with their last holder, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class FileLock:
    """
    An exclusive flock(2) on a file of its own.

    The lock belongs to the open file, not to the process: a child that inherits `fileno()` keeps it held.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def try_acquire(self) -> bool:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        return True

    def fileno(self) -> int:
        assert self._fd is not None, "only a held lock has an open file"
        return self._fd

    def let_go(self) -> None:
        """Close our end; whoever inherited the open file still holds the lock."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def release(self) -> None:
        """Unlock it for everybody."""
        if self._fd is not None:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            self.let_go()


def write_lock_note(path: Path, text: str) -> None:
    """Leave a word for `read_lock_note`; for the holder of the lock, or for the only one who may take it next."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(text)


def read_lock_note(path: Path) -> str | None:
    """The note of the lock's present holder; None when nobody holds it. Looking takes a shared lock for a moment."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(fd, 4096, 0).decode(errors="replace")
    else:
        return None
    finally:
        os.close(fd)
