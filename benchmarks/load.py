"""
The load generator: `python -I -S load.py JOB RESULT`, two paths of JSON files; a process for each round.

A closed loop over keep-alive connections: each sends its next request when the last one is answered. One loop over
epoll with requests that are ready as bytes, since what it takes from the machine the measured ones lack.

A job: `address` [host, port]; `requests`, texts of whole HTTP requests, of which each is drawn at random, evenly, with
`seed`; `connections`; then `seconds` for a time, `count` for a number of requests in total, or `each` for a number on
every connection. `pace_s` lets every connection send at that distance, and not before the last answer. `at_once` opens
all connections in the same moment and counts the opening; otherwise they are open before the clock starts.

A result: `answered` within `elapsed_s`; `statuses`, how many answers of each, those after the end included;
`latencies_us` of all; `broken` connections, and `complaints`: some of what was not a 200.
"""

from __future__ import annotations

import gc
import heapq
import json
import random
import select
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

PATIENCE_S = 60.0
"""For the answers that are under way at the end."""
CHUNK = 65_536
COMPLAINTS_MAX = 5


class Connection:
    __slots__ = ("began", "left", "partial", "socket")

    def __init__(self, opened: socket.socket, left: float) -> None:
        self.socket = opened
        self.left = left
        self.began = 0.0
        self.partial = b""


class Load:
    def __init__(self, job: dict[str, Any]) -> None:
        self._address = tuple(job["address"])
        self._requests = [text.encode("latin-1") for text in job["requests"]]
        self._size = job["connections"]
        self._seconds: float | None = job.get("seconds")
        self._unsent: float = job.get("count") or float("inf")
        self._each: float = job.get("each") or float("inf")
        self._pace_s: float | None = job.get("pace_s")
        self._at_once: bool = job.get("at_once", False)
        self._random = random.Random(job.get("seed", 1)).random
        self._poll = select.epoll()
        self._busy: dict[int, Connection] = {}
        self._paced: list[tuple[float, int, Connection]] = []
        self._deadline = float("inf")
        self._answered = 0
        self._statuses: Counter[str] = Counter()
        self._latencies_s: list[float] = []
        self._broken = 0
        self._complaints: list[str] = []

    def run(self) -> dict[str, Any]:
        connections = [] if self._at_once else [self._connect() for _ in range(self._size)]
        began = time.monotonic()
        self._deadline = began + (self._seconds or float("inf"))
        for connection in connections:
            self._begin(connection, time.monotonic())
        for _ in range(self._size if self._at_once else 0):
            self._open()
        ended = self._loop()
        return {
            "answered": self._answered,
            "elapsed_s": self._seconds or ended - began,
            "statuses": self._statuses,
            "latencies_us": [round(latency_s * 1e6) for latency_s in self._latencies_s],
            "broken": self._broken + len(self._busy),
            "complaints": self._complaints,
            "cpu_s": time.process_time(),
        }

    def _loop(self) -> float:
        """Until nothing is under way; returns when the last answer came."""
        last = time.monotonic()
        while self._busy or self._paced:
            now = time.monotonic()
            if now > last + PATIENCE_S:
                break
            while self._paced and self._paced[0][0] <= now:
                due, _, connection = heapq.heappop(self._paced)
                self._begin(connection, due)
            timeout_s = max(0.0, self._paced[0][0] - now) if self._paced else 1.0
            for fd, events in self._poll.poll(min(timeout_s, 1.0), 256):
                last = time.monotonic()
                ready = self._busy.get(fd)
                if ready is None:
                    raise RuntimeError("the server closed a connection that waited for its next turn")
                if events & select.EPOLLOUT:
                    self._opened(ready)
                else:
                    self._receive(ready)
        return last

    def _connect(self) -> Connection:
        opened = socket.create_connection(self._address, timeout=PATIENCE_S)
        opened.setblocking(False)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._poll.register(opened, select.EPOLLIN)
        return Connection(opened, self._each)

    def _open(self) -> None:
        connection = Connection(socket.socket(), self._each)
        connection.socket.setblocking(False)
        connection.began = time.monotonic()
        connection.socket.connect_ex(self._address)
        self._poll.register(connection.socket, select.EPOLLOUT)
        self._busy[connection.socket.fileno()] = connection

    def _opened(self, connection: Connection) -> None:
        fault = connection.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if fault:
            self._break(connection, f"connect: errno {fault}")
            return
        self._poll.modify(connection.socket, select.EPOLLIN)
        self._begin(connection, connection.began)

    def _begin(self, connection: Connection, due: float) -> None:
        """Send the next request, or be done; the latency counts from when it was due."""
        if self._unsent <= 0 or connection.left <= 0 or due >= self._deadline:
            self._busy.pop(connection.socket.fileno(), None)
            self._poll.unregister(connection.socket)
            connection.socket.close()
            return
        self._unsent -= 1
        connection.left -= 1
        connection.began = due
        self._busy[connection.socket.fileno()] = connection
        request = self._requests[int(self._random() * len(self._requests))]
        try:
            if connection.socket.send(request) != len(request):
                self._break(connection, "the request did not fit into the socket's buffer")
        except OSError as error:
            self._break(connection, str(error))

    def _receive(self, connection: Connection) -> None:
        try:
            received = connection.socket.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            self._break(connection, str(error))
            return
        if not received:
            self._break(connection, "closed by the server")
            return
        answer = connection.partial + received
        head_end = answer.find(b"\r\n\r\n")
        if head_end < 0 or len(answer) < head_end + 4 + _content_length(answer[:head_end]):
            connection.partial = answer
            return
        connection.partial = b""
        self._answer(connection, answer)

    def _answer(self, connection: Connection, answer: bytes) -> None:
        now = time.monotonic()
        status = answer[9:12].decode("latin-1")
        self._statuses[status] += 1
        self._latencies_s.append(now - connection.began)
        if status != "200" and len(self._complaints) < COMPLAINTS_MAX:
            self._complaints.append(answer[-300:].decode("latin-1"))
        if now <= self._deadline:
            self._answered += 1
        if self._pace_s is None:
            self._begin(connection, now)
        else:
            fd = connection.socket.fileno()
            del self._busy[fd]
            heapq.heappush(self._paced, (connection.began + self._pace_s, fd, connection))

    def _break(self, connection: Connection, why: str) -> None:
        self._broken += 1
        if len(self._complaints) < COMPLAINTS_MAX:
            self._complaints.append(why)
        self._busy.pop(connection.socket.fileno(), None)
        self._poll.unregister(connection.socket)
        connection.socket.close()


def _content_length(head: bytes) -> int:
    lowered = head.lower()
    start = lowered.find(b"\r\ncontent-length:")
    if start < 0:
        raise ValueError(f"an answer without Content-Length: {head!r}")
    end = lowered.find(b"\r\n", start + 2)
    return int(lowered[start + 17 : end if end > 0 else None])


if __name__ == "__main__":
    gc.disable()  # nothing here makes cycles
    result = Load(json.loads(Path(sys.argv[1]).read_text())).run()
    Path(sys.argv[2]).write_text(json.dumps(result))
