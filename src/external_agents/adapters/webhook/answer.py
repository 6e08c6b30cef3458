"""What an agent answered, read within limits."""

from __future__ import annotations

import re
from collections.abc import AsyncIterable, Iterable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeAlias

import attrs

from external_agents.domain.errors import MalformedJson
from external_agents.domain.invocation import ErrorCode, Outcome
from external_agents.domain.json_values import JsonText

Fields: TypeAlias = Mapping[bytes, bytes]

RETRY_AFTER_MAX_S = 366 * 86400.0

_READ_FIELDS = frozenset({b"content-encoding", b"content-length", b"retry-after", b"transfer-encoding"})
_LENGTH_DIGITS_MAX = 18
_NULL = JsonText("null")
_SECONDS = re.compile(r"[+-]?[0-9]{1,12}(?:\.[0-9]{0,9})?")
_DATE_LENGTH_MAX = 64


@attrs.frozen
class Answer:
    """A complete answer."""

    status: int
    fields: Fields
    body: bytes | bytearray = attrs.field(repr=lambda body: f"<{len(body)} bytes>")

    @property
    def is_success(self) -> bool:
        return 200 <= self.status <= 299


class TooLarge(Exception):
    """The body has more bytes than are taken."""


def fields_of(raw_headers: Iterable[tuple[bytes, bytes]]) -> Fields:
    """The header fields that mean something here, by lower-case names; several of one name are joined by a comma."""
    fields: dict[bytes, bytes] = {}
    for name, value in raw_headers:
        if (key := name.lower()) in _READ_FIELDS:
            fields[key] = fields[key] + b"," + value if key in fields else value
    return fields


def is_encoded(fields: Fields) -> bool:
    """Whether the body is something else than the agent's own bytes; asked for was `identity`."""
    coding, transfer = fields.get(b"content-encoding"), fields.get(b"transfer-encoding")
    return (coding is not None and not _words(coding) <= {b"", b"identity"}) or (
        transfer is not None and not _words(transfer) <= {b"", b"identity", b"chunked"}
    )


async def read_body(stream: AsyncIterable[bytes], fields: Fields, limit_bytes: int) -> bytes | bytearray:
    """
    The body as it comes, undecoded.

    Raises:
        TooLarge: The rest of it is still unread.
    """
    announced = fields.get(b"content-length", b"")
    if announced.isdigit() and (len(announced) > _LENGTH_DIGITS_MAX or int(announced) > limit_bytes):
        raise TooLarge
    body = bytearray()
    try:
        async for chunk in stream:
            body += chunk
            if len(body) > limit_bytes:
                raise TooLarge
    except BaseException:
        body.clear()  # The error leads here, and the stream keeps the error: both last until they are collected.
        raise
    return body


def outcome_of(answer: Answer, now: datetime) -> Outcome:
    """What a complete answer of an agent amounts to."""
    payload = payload_of(answer.body)
    if answer.is_success:
        return Outcome(status=answer.status, answer=payload)
    return Outcome(
        error=ErrorCode.HTTP_STATUS,
        status=answer.status,
        answer=payload,
        message=f"The agent answered {answer.status}.",
        retry_after_s=retry_after_s(answer.fields, now),
    )


def payload_of(body: bytes | bytearray) -> JsonText:
    """A JSON text as it is, nothing as `null`, anything else as a JSON string."""
    if not body:
        return _NULL
    try:
        return JsonText.parse(bytes(body))
    except MalformedJson:
        return JsonText.of(body.decode("utf-8", "replace"))


def retry_after_s(fields: Fields, now: datetime) -> float | None:
    """
    Seconds from now that a Retry-After asks for (RFC 9110, section 10.2.3); None when there is none to be understood.
    """
    text = fields.get(b"retry-after", b"").decode("latin-1").strip()
    if _SECONDS.fullmatch(text):
        seconds = float(text)
    elif moment := _http_date(text):
        seconds = (moment - now).total_seconds()
    else:
        return None
    return min(max(0.0, seconds), RETRY_AFTER_MAX_S)


def _words(value: bytes) -> set[bytes]:
    return {word.strip() for word in value.lower().split(b",")}


def _http_date(text: str) -> datetime | None:
    if not 0 < len(text) <= _DATE_LENGTH_MAX:
        return None
    try:
        moment = parsedate_to_datetime(text)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
