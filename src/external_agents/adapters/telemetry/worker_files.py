"""
The figures of several processes: each writes files of its own into one folder, and whoever is asked reads them all.

A worker that ended leaves its counts in `counter_ended.db` and `histogram_ended.db`, so that neither the counts go down
nor the files become more, however many workers come and go. This module is also a configuration of gunicorn's that sees
to it: `gunicorn -c python:external_agents.adapters.telemetry.worker_files`.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client import Metric as Family
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
LOCK_FILE = "lock"
GATE_FILE = "gate"
LOCK_PATIENCE_S = 1.0
LOCK_POLL_S = 0.01

_log = logging.getLogger(__name__)


class WorkerFiles(Collector):
    """Everything in the folder, added up."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Family]:
        with _among_readers(self._folder):
            files = [str(file) for file in self._folder.glob("*.db") if _size_of(file)]
            families: Iterable[Family] = MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]
        return sorted(families, key=lambda family: family.name)

    def exposition(self) -> tuple[str, bytes]:
        """The media type and the text, in Prometheus's text format; for a process that counts nothing itself."""
        return CONTENT_TYPE_PLAIN_0_0_4, generate_latest(self)


def child_exit(server: object, worker: Any) -> None:
    """gunicorn's hook, in its master, when a worker has ended, however it ended."""
    if folder := os.environ.get(FOLDER_VARIABLE):
        try:
            settle_estate(Path(folder), worker.pid)
        except Exception:  # It would end the master.
            _log.exception("the counts of worker %s stay in files of their own", worker.pid)


CHILD_EXIT = f"{__name__}:{child_exit.__name__}"
"""Where gunicorn finds it."""


def settle_estate(folder: Path, pid: int, *, patience_s: float = LOCK_PATIENCE_S) -> None:
    """
    Let the gauges of an ended process vanish, and keep its counts.

    Args:
        patience_s: How long to wait for those who read.

    Raises:
        TimeoutError: Somebody reads for too long; the counts stay in the files of that process.
    """
    mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]
    with _alone_in(folder, patience_s):
        for kind in ("counter", "histogram"):
            left, total = folder / f"{kind}_{pid}.db", folder / f"{kind}_ended.db"
            if left.exists():
                _add_up([left, total], into=total)
                left.unlink()


def _add_up(files: Sequence[Path], *, into: Path) -> None:
    sums: defaultdict[str, float] = defaultdict(float)
    for file in filter(_size_of, files):
        for key, value, *_ in MmapedDict.read_all_values_from_file(str(file)):  # type: ignore[no-untyped-call]
            sums[key] += value
    new = into.with_suffix(".new")
    new.unlink(missing_ok=True)
    written = MmapedDict(str(new))  # type: ignore[no-untyped-call]
    for key, value in sums.items():
        written.write_value(key, value, 0.0)  # type: ignore[no-untyped-call]
    written.close()  # type: ignore[no-untyped-call]
    new.replace(into)


def _size_of(file: Path) -> int:
    """0 also of a file that has vanished. A process that is killed between making one and sizing it leaves it at 0."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


@contextmanager
def _among_readers(folder: Path) -> Iterator[None]:
    """While the files stay the same. Whoever waits to change them goes first: he has the gate meanwhile."""
    with (folder / LOCK_FILE).open("ab") as lock:
        with (folder / GATE_FILE).open("ab") as gate:
            fcntl.flock(gate, fcntl.LOCK_EX)
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield


@contextmanager
def _alone_in(folder: Path, patience_s: float) -> Iterator[None]:
    """While nobody reads: else a reader might meet counts twice, or not at all."""
    deadline = time.monotonic() + patience_s
    with (folder / GATE_FILE).open("ab") as gate, (folder / LOCK_FILE).open("ab") as lock:
        for file in (gate, lock):
            while not _is_taken(file):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{file.name} is held by somebody")
                time.sleep(LOCK_POLL_S)
        yield


def _is_taken(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
