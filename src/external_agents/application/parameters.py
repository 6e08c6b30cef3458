"""The parameters of lists: pages, filters, cursors. Read after the permission is checked, all faults at once."""

from __future__ import annotations

import base64
import binascii
import enum
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TypeVar
from uuid import UUID

import attrs

from external_agents.domain.agent import ExternalAgent
from external_agents.domain.errors import Fault, ValidationError
from external_agents.domain.invocation import ExternalAgentInvocation

LIMIT_MAX = 100

_RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(?:\.\d{1,6}\d*)?(?:[Zz]|[+-]\d\d:\d\d)", re.ASCII)
_NO_MOMENT = "must be a time with an offset (RFC 3339), such as 2026-01-31T12:00:00Z; in a URL, + is written %2B"
PAGE_MAX = 1_000_000_000

E = TypeVar("E", bound=enum.StrEnum)


@attrs.frozen(kw_only=True)
class AgentPage:
    items: Sequence[ExternalAgent]
    page: int
    limit: int
    total: int

    @property
    def pages(self) -> int:
        return math.ceil(self.total / self.limit)


@attrs.frozen(kw_only=True)
class InvocationPage:
    """`next_cursor`: pass it as `cursor` for the page after; None at the end."""

    items: Sequence[ExternalAgentInvocation]
    next_cursor: str | None


class ParameterReader:
    """Reads values one by one and keeps their faults for the end."""

    def __init__(self, unknown: Mapping[str, object]) -> None:
        self._faults = [Fault(name, "is not a known parameter") for name in unknown]

    def finish(self) -> None:
        """
        Raises:
            ValidationError: Every fault of the parameters read.
        """
        if self._faults:
            raise ValidationError(self._faults)

    def whole(self, name: str, value: int | str, *, maximum: int) -> int:
        text = str(value)
        if text.isascii() and text.isdecimal() and len(text) <= 10 and 1 <= int(text) <= maximum:
            return int(text)
        self._faults.append(Fault(name, f"must be an integer from 1 to {maximum}"))
        return 1

    def choice(self, name: str, value: str | None, choices: type[E]) -> E | None:
        if value is None:
            return None
        try:
            return choices(value)
        except ValueError:
            self._faults.append(Fault(name, "must be one of " + ", ".join(choices)))
            return None

    def member(self, name: str, value: str | None, members: Sequence[str]) -> str | None:
        if value is not None and value not in members:
            self._faults.append(Fault(name, "must be one of " + ", ".join(members)))
        return value

    def text(self, name: str, value: str | None) -> str | None:
        if value is not None and ("\0" in value or not _is_utf8(value)):
            self._faults.append(Fault(name, "must be text without NUL"))
        return value

    def moment(self, name: str, value: datetime | str | None) -> datetime | None:
        """An aware datetime, or RFC 3339 text with an offset."""
        try:
            if isinstance(value, str):
                if _RFC_3339.fullmatch(value) is None:
                    raise ValueError
                value = datetime.fromisoformat(value.upper())
            if value is not None and value.tzinfo is None:
                raise ValueError
            return value.astimezone(UTC) if value else None
        except (ValueError, OverflowError):
            self._faults.append(Fault(name, _NO_MOMENT))
            return None

    def cursor(self, name: str, value: str | None) -> UUID | None:
        if value is None:
            return None
        try:
            return UUID(bytes=base64.b64decode(value.encode("ascii") + b"==", altchars=b"-_", validate=True))
        except (ValueError, UnicodeError, binascii.Error):
            self._faults.append(Fault(name, "must be the next_cursor of another answer"))
            return None


def cursor_of(invocation: ExternalAgentInvocation) -> str:
    return base64.urlsafe_b64encode(invocation.id.bytes).rstrip(b"=").decode("ascii")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
