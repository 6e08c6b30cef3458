"""The server's log: appended to by the server, bounded by us."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MAX_BYTES = 10 * 1024 * 1024
TAIL_BYTES = 16 * 1024
GRAVE = ("launch: ", "PANIC: ", "FATAL: ", "initdb: error: ", "error: ")


class ServerLog:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin = 0

    @contextmanager
    def opened(self) -> Iterator[int]:
        """A file descriptor that appends, so that the server goes on at the beginning after `trim`."""
        self.trim()
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            self._begin = os.fstat(fd).st_size
            yield fd
        finally:
            os.close(fd)

    def trim(self) -> None:
        with suppress(FileNotFoundError):
            if self.path.stat().st_size > MAX_BYTES:
                os.truncate(self.path, 0)

    def reason(self) -> str:
        """The first grave line since `opened`, else the last line: what a person needs to see."""
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(min(self._begin, size), size - TAIL_BYTES))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        for line in lines:
            for word in GRAVE:
                if word in line:
                    return line.partition(word)[2].strip()
        return lines[-1] if lines else "it said nothing"
