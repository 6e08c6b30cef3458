"""The ids of the request that is being answered, for every line that is written meanwhile."""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import Any

from structlog.typing import EventDict, WrappedLogger

_ids: ContextVar[dict[str, Any]] = ContextVar("external_agents.request_ids")


class RequestContext:
    """`structlog.contextvars.bound_contextvars` for all ids at once: one variable, at a fifth of the time."""

    __slots__ = ("_bound", "_token")

    def __init__(self, **ids: Any) -> None:
        self._bound = ids

    def __enter__(self) -> None:
        self._token: Token[dict[str, Any]] = _ids.set(self._bound)

    def __exit__(self, *_: object) -> None:
        _ids.reset(self._token)


def merge_request_ids(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    """A processor. What the event says itself goes before."""
    ids = _ids.get(None)
    return event if ids is None else {**ids, **event}
