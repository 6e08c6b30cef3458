"""Query parameters: which there are, and handing them to a use case that judges them after the permission."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import TypeVar
from urllib.parse import parse_qsl

import attrs
from falcon.asgi import Request

from external_agents.application.parameters import LIMIT_MAX, PAGE_MAX
from external_agents.domain.agent import AgentStatus
from external_agents.domain.catalog import Catalog
from external_agents.domain.errors import Fault, ValidationError
from external_agents.domain.invocation import InvocationStatus
from external_agents.domain.schema import JsonSchema

T = TypeVar("T")

_LIMIT = {"type": "integer", "minimum": 1, "maximum": LIMIT_MAX, "default": 20, "description": "Items on a page."}


def agent_filters(catalog: Catalog) -> Mapping[str, JsonSchema]:
    """The parameters of a list of agents."""
    return {
        "page": {"type": "integer", "minimum": 1, "maximum": PAGE_MAX, "default": 1, "description": "From 1."},
        "limit": _LIMIT,
        "status": {
            "type": "string",
            "enum": [status.value for status in AgentStatus],
            "description": "Only these. Deleted agents are listed with `status=deleted` alone.",
        },
        "provider": {"type": "string", "enum": list(catalog.platforms), "description": "Only agents of this platform."},
        "tag": {"type": "string", "description": "Only agents that carry this tag."},
        "q": {"type": "string", "description": "A part of the name or the description, whatever the case."},
    }


INVOCATION_FILTERS: Mapping[str, JsonSchema] = {
    "status": {
        "type": "string",
        "enum": [status.value for status in InvocationStatus],
        "description": "Only invocations with this status.",
    },
    "since": {
        "type": "string",
        "format": "date-time",
        "description": "Created then or later (RFC 3339 with an offset).",
    },
    "until": {"type": "string", "format": "date-time", "description": "Created before then (RFC 3339 with an offset)."},
    "limit": _LIMIT,
    "cursor": {
        "type": "string",
        "pattern": "^[A-Za-z0-9_-]{22}$",
        "description": "The `next_cursor` of the page before.",
    },
}


@attrs.frozen
class Query:
    """The parameters of a request: those that a use case can judge, and what is wrong with the others."""

    values: Mapping[str, str]
    faults: tuple[Fault, ...]

    @classmethod
    def of(cls, req: Request, known: Collection[str]) -> Query:
        pairs = parse_qsl(req.query_string, keep_blank_values=True, errors="surrogateescape")
        times = Counter(name for name, _ in pairs)
        values: dict[str, str] = {}
        faults: list[Fault] = []
        for name, value in pairs:
            if name not in known:
                faults.append(Fault(name, "is not a known parameter"))
            elif times[name] > 1:
                faults.append(Fault(name, "is given more than once"))
            else:
                values[name] = value
        return cls(values, tuple(faults))

    async def ask(self, use_case: Callable[..., Awaitable[T]]) -> T:
        """
        The use case's answer, called with the values by name.

        It is called even where there are faults: existence and permission come first, and it may find more of them.

        Raises:
            ValidationError: Every fault of the query.
        """
        if not self.faults:
            return await use_case(**self.values)
        try:
            await use_case(**self.values)
        except ValidationError as invalid:
            raise ValidationError([*self.faults, *invalid.errors]) from None
        raise ValidationError(self.faults)
