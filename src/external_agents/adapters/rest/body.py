"""The body of a request: counted while it is read, and never left in the way of the next request."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from functools import lru_cache

import falcon

from external_agents.adapters.rest.asgi import Event, Fields, Receive
from external_agents.domain.errors import MalformedJson

ARRIVED_BYTES_MAX = 256 * 1024
ARRIVED_S = 0.1
"""What counts as having arrived together with the head of a request."""

GRACE_S = 20.0
PACE_BYTES_PER_S = 8_192
"""How long a body may take: this, and a second more for so many bytes that have come."""

DRAIN_BYTES_MAX = 64 * 1024 * 1024
DRAIN_S = 5.0
"""
How much of an unwanted body is taken after the answer, and for how long.

A connection that is closed while bytes arrive is reset, and the reset destroys the answer on its way to a client that
is still sending.
"""

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_MEDIA_TYPE = re.compile(
    rf'application/(?:json|{_TOKEN}\+json)\s*+(?P<parameters>(?:;\s*+(?:{_TOKEN}=(?:{_TOKEN}|"[^"]*+"))?+\s*+)*+)',
    re.IGNORECASE,
)
"""Possessive: a hostile value must not be split in exponentially many ways."""
_CHARSET = re.compile(rf';\s*charset="?(?P<charset>{_TOKEN})', re.IGNORECASE)


class BodyTooSlow(Exception):
    """A body dripped, or stopped before its end."""


class RequestBody:
    """The body of one request. `ended` and `broken`: whether all of it has come, whether it stopped before its end."""

    def __init__(self, fields: Fields, receive: Receive, limit_bytes: int, grace_s: float = GRACE_S) -> None:
        self._fields = fields
        self._receive = receive
        self._limit_bytes = limit_bytes
        self._grace_s = grace_s
        self._touched = False
        self._ended = False
        self._broken = False

    async def opening(self) -> Event:
        """What the framework gets as the first event, so that a request is judged before its body is waited for."""
        return {"type": "http.request", "body": b"", "more_body": True}

    async def read(self) -> bytes:
        """
        The whole body, known to claim that it is JSON.

        Raises:
            falcon.HTTPContentTooLarge: Over the limit; at once where Content-Length says so.
            BodyTooSlow: It came with less than the pace that a body must have.
            falcon.HTTPUnsupportedMediaType: Compressed, or not JSON in UTF-8.
            MalformedJson: Empty, or cut off.
        """
        declared = self._declared_bytes
        if declared is not None and declared > self._limit_bytes:
            raise self._too_large()
        content = await self._in_time()
        self._require_json(is_empty=not content)
        if not content:
            raise MalformedJson("The body is empty.")
        return content

    async def _in_time(self) -> bytes:
        pieces: list[bytes] = []
        size = 0
        until_s = asyncio.get_running_loop().time() + self._grace_s
        try:
            while not self._ended:
                piece = await self._next_piece(until_s + size / PACE_BYTES_PER_S)
                size += len(piece)
                if size > self._limit_bytes:
                    raise self._too_large()
                pieces.append(piece)
        except TimeoutError:
            raise BodyTooSlow("The body came too slowly.") from None
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def skip_arrived(self) -> None:
        """Take a short body that nobody reads and that has come already, so that the connection stays of use."""
        if self._ended:
            return
        waits_for_continue = not self._touched and any(self._fields.get(b"expect", ()))
        if not waits_for_continue and (self._declared_bytes or 0) <= ARRIVED_BYTES_MAX:
            await self._skip(ARRIVED_BYTES_MAX, ARRIVED_S)

    @property
    def spoils_connection(self) -> bool:
        """Whether something of the body is still to come, or never will: the next request could not be told from it."""
        return self._broken or (not self._ended and self._is_announced)

    async def drain(self) -> None:
        """Take what is left of the body after the answer, within bounds."""
        await self._skip(DRAIN_BYTES_MAX, DRAIN_S)

    async def _skip(self, bytes_max: int, timeout_s: float) -> None:
        if self._ended or not self._is_announced:
            return
        until_s = asyncio.get_running_loop().time() + timeout_s
        with suppress(TimeoutError, MalformedJson):
            while not self._ended and bytes_max > 0:
                bytes_max -= len(await self._next_piece(until_s))

    async def _next_piece(self, until_s: float) -> bytes:
        """
        Raises:
            TimeoutError: It is past that time of the event loop. Each piece begins with a look at the clock: what
                gunicorn waits with can lose a cancellation when a piece comes at the same moment.
            MalformedJson: The caller has gone.
        """
        if asyncio.get_running_loop().time() >= until_s:
            raise TimeoutError
        self._touched = True
        async with asyncio.timeout_at(until_s):
            event = await self._receive()
        if event["type"] == "http.disconnect":
            self._ended = self._broken = True
            raise MalformedJson("The body was cut off.")
        self._ended = not event.get("more_body", False)
        piece: bytes = event.get("body", b"")
        return piece

    @property
    def _declared_bytes(self) -> int | None:
        values = self._fields.get(b"content-length")
        return int(values[0]) if values and values[0].isdigit() else None

    @property
    def _is_announced(self) -> bool:
        """HTTP/1 says by these two fields that a body follows; on HTTP/2 no body blocks a connection."""
        return bool(self._declared_bytes) or any(self._fields.get(b"transfer-encoding", ()))

    def _too_large(self) -> falcon.HTTPContentTooLarge:
        return falcon.HTTPContentTooLarge(description=f"The body is larger than {self._limit_bytes} bytes.")

    def _require_json(self, *, is_empty: bool) -> None:
        codings = {value.strip().lower() for value in self._fields.get(b"content-encoding", ())}
        if codings - {b"identity", b""}:
            raise falcon.HTTPUnsupportedMediaType(
                description="The body must not be compressed.", headers={"Accept-Encoding": "identity"}
            )
        types = [value.decode("latin-1").strip() for value in self._fields.get(b"content-type", ())]
        if not types and is_empty:
            return
        if len(types) != 1 or not _is_json(types[0]):
            raise falcon.HTTPUnsupportedMediaType(
                description="The body must be JSON in UTF-8, with a Content-Type that says so: application/json.",
                headers={"Accept": "application/json"},
            )


@lru_cache(maxsize=64)
def _is_json(content_type: str) -> bool:
    media_type = _MEDIA_TYPE.fullmatch(content_type)
    if media_type is None:
        return False
    charsets = {match["charset"].lower() for match in _CHARSET.finditer(media_type["parameters"])}
    return charsets <= {"utf-8", "utf8"}
