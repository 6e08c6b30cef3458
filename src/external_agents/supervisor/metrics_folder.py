"""The private folder through which the workers tell each other their metrics; it lives as long as `serve`."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from external_agents.adapters.postgres.embedded.file_lock import FileLock
from external_agents.adapters.rest.gunicorn_server import MEMORY_FOLDER

PREFIX = "external-agents-metrics-"
OWNER_FILE = "owner"
ROOM_BYTES = 16 * 1024 * 1024
"""What must be free in memory. A worker writes less than 1 MB; a full memory file system would end it with SIGBUS."""


@contextmanager
def metrics_folder(memory: Path = MEMORY_FOLDER) -> Iterator[Path]:
    """
    A new one, in memory where there is room, gone after the block. What a killed `serve` left behind goes as well.

    Its owner holds a lock in it, which ends with the process: nobody takes the folder of a `serve` that lives.
    """
    base = memory if _has_room(memory) else Path(tempfile.gettempdir())
    remove_leftovers(base)
    folder = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=base))
    owner = FileLock(folder / OWNER_FILE)
    try:
        owner.try_acquire()
        folder = folder.rename(base / folder.name.removeprefix("."))  # Seen by others only now that it is locked.
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        owner.release()


def _has_room(folder: Path) -> bool:
    return os.access(folder, os.W_OK) and shutil.disk_usage(folder).free >= ROOM_BYTES


def remove_leftovers(base: Path = MEMORY_FOLDER) -> None:
    """Those of ours in `base` whose owner has gone."""
    for folder in base.glob(f"{PREFIX}*"):
        with suppress(OSError):
            status = folder.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
                owner = FileLock(folder / OWNER_FILE)
                if owner.try_acquire():
                    shutil.rmtree(folder, ignore_errors=True)
                    owner.release()
