"""
A connection of our gunicorn worker: which heads of requests it lets in, and how long it waits.

gunicorn's parser in C is fast, and lenient: it keeps a head without end for ever, takes folded lines and bare line
feeds, and overflows where it counts the bytes of a body or a chunk. So heads are gathered and looked at before it gets
them, and bodies in chunks, which are rare, go to gunicorn's parser in Python, which is strict.
"""

from __future__ import annotations

import asyncio
import re
from http import HTTPStatus
from typing import Any

import attrs
import orjson
from gunicorn.asgi.parser import PythonProtocol  # type: ignore[import-untyped]
from gunicorn.asgi.protocol import ASGIProtocol  # type: ignore[import-untyped]

from external_agents.adapters.rest.errors import PROBLEM_MEDIA_TYPE, TYPE_PREFIX

HEAD_BYTES_MAX = 65_536
LINGER_S = 1.0
LINGER_BYTES_MAX = 4 * 1024 * 1024
"""A connection that is closed while bytes arrive is reset, and the reset destroys the refusal on its way."""

_HEAD_END = b"\r\n\r\n"
_BAD_LINE_END = re.compile(rb"\n(?:(?<!\r\n)|[ \t])")
"""A bare line feed; a line that goes on in the next one (RFC 9112, sections 2.2 and 5.2)."""
_METHOD = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]")
_NEEDS_HOST = re.compile(rb"[^\r\n]* HTTP/1\.1\r\n")
_HOST = re.compile(rb"\r\nhost:", re.IGNORECASE)
_FRAMING = re.compile(rb"\r\n(transfer-encoding|content-length):([^\r]*)", re.IGNORECASE)
_LENGTH_DIGITS_MAX = 18
_PROBLEMS = {400: "bad-request", 408: "too-slow", 414: "uri-too-long", 431: "headers-too-large"}


@attrs.frozen(kw_only=True)
class Patience:
    """
    How long a connection may take.

    Attributes:
        head_s: For the head of a request: since the connection for the first one, then since its first byte.
        answer_s: For the next `answer_bytes` of an answer to be taken, or for what is left of it.
    """

    head_s: float = 20.0
    answer_s: float = 30.0
    answer_bytes: int = 65_536


class Connection(ASGIProtocol):  # type: ignore[misc]
    """
    A connection, whose parser goes with it.

    The parser in C holds methods of the connection, and no garbage collector sees that: each connection that there ever
    was would stay, with 11 KB.
    """

    _task: asyncio.Task[None] | None
    _closed: bool

    def __init__(self, worker: Any) -> None:
        super().__init__(worker)
        self._head = bytearray()
        self._head_since_s: float | None = None
        self._is_refused = False
        self._discarded_bytes = 0
        self._untaken: tuple[float, int] | None = None

    def keep_time(self, now_s: float, patience: Patience) -> None:
        """Close the connection when it has taken too long."""
        if self.transport is None:
            return
        if self._head_since_s is not None and now_s - self._head_since_s > patience.head_s:
            if self._head:
                self._refuse(408, "The head of the request came too slowly.")
            else:
                self._head_since_s = None
                self._close_transport()
                self._request_ready.set()
        elif self._takes_too_little(now_s, patience):
            self.transport.abort()

    def _takes_too_little(self, now_s: float, patience: Patience) -> bool:
        left_bytes: int = self.transport.get_write_buffer_size()
        if not left_bytes:
            self._untaken = None
            return False
        since_s, before_bytes = self._untaken or (now_s, left_bytes)
        if self._untaken is None or left_bytes > before_bytes:
            self._untaken = (now_s, left_bytes)
        elif now_s - since_s > patience.answer_s:
            self._untaken = (now_s, left_bytes)
            return before_bytes - left_bytes < patience.answer_bytes
        return False

    def _start_http1(self, buffered: bytes = b"") -> None:
        self._head_since_s = self.worker.loop.time()
        super()._start_http1(buffered)

    def data_received(self, data: bytes) -> None:
        if not self._is_refused:
            super().data_received(data)
            return
        self._discarded_bytes += len(data)
        if self._discarded_bytes > LINGER_BYTES_MAX:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_since_s = None
        super().connection_lost(exc)
        if self._task is None:
            self._forget_parser(None)
        else:
            self._task.add_done_callback(self._forget_parser)

    def _forget_parser(self, _: object) -> None:
        self._callback_parser = None

    def _feed_callback_parser(self, data: bytes) -> bool:
        if self._request_ready.is_set() or self._proxy_protocol != "off":
            going_on: bool = super()._feed_callback_parser(data)
            return going_on
        if self._head_since_s is None:
            self._head_since_s = self.worker.loop.time()
        looked_at = max(0, len(self._head) - len(_HEAD_END))
        self._head += data
        end = self._head.find(_HEAD_END, looked_at)
        if _BAD_LINE_END.search(self._head, looked_at, len(self._head) if end < 0 else end):
            return self._refuse(400, "A line of the head does not end as it should.")
        if not _METHOD.match(self._head):
            return self._refuse(400, "The request does not begin with a method.")
        if max(end, 0) > HEAD_BYTES_MAX or (end < 0 and len(self._head) > HEAD_BYTES_MAX):
            return self._refuse(431, f"The head of the request is larger than {HEAD_BYTES_MAX} bytes.")
        if end < 0:
            return True
        message = bytes(self._head)
        self._head.clear()
        return self._let_in(message, end + len(_HEAD_END))

    def _let_in(self, message: bytes, head_end: int) -> bool:
        """Give the parser a message whose head is whole."""
        for name, value in _FRAMING.findall(message, 0, head_end):
            if name[:1] in b"Cc":
                if len(value.strip()) > _LENGTH_DIGITS_MAX:
                    return self._refuse(400, "The field Content-Length is not valid.")
            elif value.strip().lower() != b"chunked":
                return self._refuse(400, "The only transfer coding that is understood is chunked.")
            else:
                self._callback_parser = self._strict_parser()
        if _NEEDS_HOST.match(message) and not _HOST.search(message, 0, head_end):
            return self._refuse(400, "The header field Host is missing.")
        going_on: bool = super()._feed_callback_parser(message)
        return going_on

    def _strict_parser(self) -> Any:
        return PythonProtocol(
            on_headers_complete=self._on_headers_complete,
            on_body=self._on_body,
            on_message_complete=self._on_message_complete,
            limit_request_line=self.cfg.limit_request_line,
            limit_request_fields=self.cfg.limit_request_fields,
            limit_request_field_size=self.cfg.limit_request_field_size,
        )

    def _on_headers_complete(self) -> bool:
        self._head_since_s = None
        skips_body: bool = super()._on_headers_complete()
        return skips_body

    def _is_websocket_upgrade(self, request: Any) -> bool:
        """Never: the request is answered as it would be without the wish (RFC 9110, section 7.8)."""
        return False

    def _refuse(self, status: int, detail: str) -> bool:
        self._send_error_response(status, detail)
        self._close_transport()
        return False

    def _send_error_response(self, status: int, message: str, extra_headers: Any = ()) -> None:
        phrase = HTTPStatus(status).phrase
        body = orjson.dumps(
            {
                "type": TYPE_PREFIX + _PROBLEMS.get(status, "bad-request"),
                "title": phrase,
                "status": status,
                "detail": message.encode("utf-8", "backslashreplace").decode() or phrase,
            }
        )
        fields = [
            f"HTTP/1.1 {status} {phrase}",
            f"Content-Type: {PROBLEM_MEDIA_TYPE}",
            f"Content-Length: {len(body)}",
            "Cache-Control: no-store",
            "X-Content-Type-Options: nosniff",
            *(f"{name}: {value}" for name, value in extra_headers),
            "Connection: close",
        ]
        self._is_refused = True
        self._head_since_s = None
        self._safe_write("\r\n".join([*fields, "", ""]).encode("latin-1") + body)

    def _close_transport(self) -> None:
        if not self._is_refused:
            super()._close_transport()
        elif not self._closed:
            self._closed = True
            if self.transport.can_write_eof() and not self.transport.is_closing():
                self.transport.write_eof()
            self.worker.loop.call_later(LINGER_S, self.transport.close)
            self._request_ready.set()
