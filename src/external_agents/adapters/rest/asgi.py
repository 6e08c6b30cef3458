"""The shapes of ASGI (https://asgi.readthedocs.io, version 3), as far as they are used here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

Scope: TypeAlias = dict[str, Any]
Event: TypeAlias = Mapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Event]]
Send: TypeAlias = Callable[[dict[str, Any]], Awaitable[None]]
AsgiApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]


def field_values(scope: Scope, name: bytes) -> list[bytes]:
    """The values of a header field, one for each time that it was sent."""
    return [value for field, value in scope["headers"] if field == name]
