"""The shapes of ASGI (https://asgi.readthedocs.io, version 3), as far as they are used here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias

Scope: TypeAlias = dict[str, Any]
Event: TypeAlias = Mapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Event]]
Send: TypeAlias = Callable[[dict[str, Any]], Awaitable[None]]
AsgiApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]


Fields: TypeAlias = Mapping[bytes, Sequence[bytes]]


def fields_of(scope: Scope) -> Fields:
    """The header fields by their names in lower case: the values of each, one for each time that it was sent."""
    fields: dict[bytes, list[bytes]] = {}
    for name, value in scope["headers"]:
        fields.setdefault(name, []).append(value)
    return fields
