"""
The agent that everybody calls: `python -I -S agent.py LISTENER_FD`, as cheap as an agent can be.

One process, one loop over epoll, one fixed answer of 200 bytes. Requests are counted by their path, and `GET /counts`
tells the counts; a path that begins with `/slow` is answered after `SLOW_S`.
"""

from __future__ import annotations

import gc
import json
import select
import socket
import sys
import time
from collections import Counter, deque

SLOW_S = 2.0
COST = "0.01"
_PADDING = "x" * (200 - len(json.dumps({"said": "", "metadata": {"cost": COST}})))
BODY = json.dumps({"said": _PADDING, "metadata": {"cost": COST}}).encode()
CHUNK = 65_536


def _answer(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


ANSWER = _answer(BODY)


class Agent:
    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._poll = select.epoll()
        self._connections: dict[int, socket.socket] = {}
        self._partial: dict[int, bytes] = {}
        self._counts: Counter[str] = Counter()
        self._due: deque[tuple[float, socket.socket]] = deque()
        """Answers that wait for their time; all wait equally long, so they come due in order."""

    def run(self) -> None:
        self._listener.setblocking(False)
        self._poll.register(self._listener, select.EPOLLIN)
        own = self._listener.fileno()
        while True:
            timeout_s = max(0.0, self._due[0][0] - time.monotonic()) if self._due else -1
            for fd, _ in self._poll.poll(timeout_s):
                if fd == own:
                    self._accept()
                else:
                    self._receive(fd)
            now = time.monotonic()
            while self._due and self._due[0][0] <= now:
                self._send(self._due.popleft()[1], ANSWER)

    def _accept(self) -> None:
        try:
            while True:
                connection, _ = self._listener.accept()
                connection.setblocking(False)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._connections[connection.fileno()] = connection
                self._poll.register(connection, select.EPOLLIN)
        except BlockingIOError:
            return

    def _receive(self, fd: int) -> None:
        connection = self._connections[fd]
        try:
            received = connection.recv(CHUNK)
        except BlockingIOError:
            return
        except ConnectionError:
            received = b""
        if not received:
            self._close(connection)
            return
        request = self._partial.pop(fd, b"") + received
        head_end = request.find(b"\r\n\r\n")
        if head_end < 0 or len(request) < head_end + 4 + _content_length(request[:head_end]):
            self._partial[fd] = request
            return
        self._serve(connection, request)

    def _serve(self, connection: socket.socket, request: bytes) -> None:
        method, target, _ = request.split(b" ", 2)
        path = target.decode("latin-1")
        if method == b"GET":
            self._send(connection, _answer(json.dumps(self._counts).encode()))
            return
        self._counts[path] += 1
        if path.startswith("/slow"):
            self._due.append((time.monotonic() + SLOW_S, connection))
        else:
            self._send(connection, ANSWER)

    def _send(self, connection: socket.socket, answer: bytes) -> None:
        try:
            connection.send(answer)
        except OSError:  # the caller has gone
            if connection.fileno() >= 0:
                self._close(connection)

    def _close(self, connection: socket.socket) -> None:
        fd = connection.fileno()
        self._poll.unregister(fd)
        self._connections.pop(fd, None)
        self._partial.pop(fd, None)
        connection.close()


def _content_length(head: bytes) -> int:
    lowered = head.lower()
    start = lowered.find(b"\r\ncontent-length:")
    if start < 0:
        if b"\r\ntransfer-encoding:" in lowered:
            raise ValueError("this agent takes no chunked requests")
        return 0
    end = lowered.find(b"\r\n", start + 2)
    return int(lowered[start + 17 : end if end > 0 else None])


if __name__ == "__main__":
    gc.disable()  # nothing here makes cycles
    Agent(socket.socket(fileno=int(sys.argv[1]))).run()
