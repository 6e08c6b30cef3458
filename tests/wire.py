"""Speaking to the service in bytes, as no client library would let one."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import attrs

from serve import API, agent_document, bearer

PATIENCE_S = 30.0
QUIET_S = 0.03
ALLOWED_5XX = {b"502", b"504"}
"""Of an invocation whose agent failed; 500 is ours, and 503 has no reason here."""

_STATUS_LINE = re.compile(rb"HTTP/1\.[01] (\d{3}) ")


@attrs.frozen
class Operation:
    method: str
    path: str
    takes_body: bool
    examples: tuple[Any, ...] = ()


class Wire:
    """
    Attributes:
        operations: Every one of the document, so that a new route is fuzzed too.
        ids: What path parameters may be filled with to reach something.
    """

    def __init__(self, address: str, key: str, agent_url: str) -> None:
        parts = urlsplit(address)
        assert parts.hostname
        assert parts.port
        self._address = (parts.hostname, parts.port)
        self.authorization = f"Authorization: {bearer(key)['Authorization']}".encode()
        self.operations = tuple(_operations(self.ask("GET", "/openapi.json")))
        document = agent_document(agent_url, name="Fuzzed", max_attempts=1, timeout_s=5)
        self.agent_id = str(self.ask("POST", API, document)["id"])
        self.invocation_id = str(self.ask("POST", f"{API}/{self.agent_id}/invoke", {})["id"])

    def ask(self, method: str, path: str, document: Any = None) -> Any:
        """A plain request that succeeds."""
        connection = http.client.HTTPConnection(*self._address, timeout=PATIENCE_S)
        name, _, value = self.authorization.decode().partition(": ")
        headers = {name: value, "Content-Type": "application/json"}
        connection.request(method, path, None if document is None else json.dumps(document), headers)
        with connection.getresponse() as answer:
            text = answer.read()
        connection.close()
        assert answer.status < 300, (answer.status, text)
        return json.loads(text)

    def exchange(self, request: bytes, *, is_whole: bool = False) -> bytes:
        """
        All that comes back until the server closes.

        Args:
            is_whole: The answer is waited for. Otherwise the client closes its half when nothing comes for a moment:
                what the server lacks will never be sent.
        """
        with socket.create_connection(self._address, timeout=PATIENCE_S) as raw:
            answer = b""
            with suppress(ConnectionError):  # It may be refused, and closed, while it is still being sent.
                raw.sendall(request)
                while piece := self._next_piece(raw, PATIENCE_S if is_whole else QUIET_S):
                    answer += piece
            return answer

    def _next_piece(self, raw: socket.socket, patience_s: float) -> bytes:
        raw.settimeout(patience_s)
        try:
            return raw.recv(65_536)
        except TimeoutError:
            assert patience_s < PATIENCE_S, "the server neither answers nor closes"
        raw.shutdown(socket.SHUT_WR)
        raw.settimeout(PATIENCE_S)
        return raw.recv(65_536)

    def judged(self, request: bytes, *, is_whole: bool = False) -> bytes:
        """The answer to whatever was sent: no failure of ours, and nothing of our inside."""
        answer = self.exchange(request, is_whole=is_whole)
        statuses = _STATUS_LINE.findall(answer)
        failures = [status for status in statuses if status >= b"500" and status not in ALLOWED_5XX]
        assert not failures, (request, answer)
        assert statuses or not (answer or is_whole), (request, answer)
        assert b"Traceback" not in answer, (request, answer)
        return answer

    def request(self, method: str, target: bytes, *fields: bytes, body: bytes = b"") -> bytes:
        """A request with credentials, whole if its parts are."""
        head = [method.encode() + b" " + target + b" HTTP/1.1", b"Host: api.test", b"Connection: close"]
        if body:
            head.append(b"Content-Length: %d" % len(body))
        return b"\r\n".join([*head, self.authorization, *fields, b"", body])


def _operations(document: Any) -> Iterator[Operation]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if method != "parameters":
                content = operation.get("requestBody", {}).get("content", {})
                examples = [
                    example["value"] for media in content.values() for example in media.get("examples", {}).values()
                ]
                yield Operation(method.upper(), path, bool(content), tuple(examples))
