"""How far a request has come: known to the one who sends it, the egress guard, and the connection."""

from __future__ import annotations

import contextvars

import attrs
from yarl import URL

from external_agents.domain.egress import Destination

HEAD_LIMIT_BYTES = 64 * 1024
"""Of all header fields of an answer together, and of the interim answers before it."""

FRAMING_FACTOR = 4
"""How many bytes on the wire a byte of the body may take: chunks have a size and two line ends each."""


@attrs.define
class Journey:
    """
    Attributes:
        url: Exactly what is asked for.
        org_id: Whose URL it is.
        refused: The egress guard has stopped it.
        reached: It has a connection, so that the other side may have seen any part of it.
        answered: The head of the answer is complete.
        flooded: More came in than is taken.
    """

    url: URL
    answer_limit_bytes: int
    org_id: str
    refused: bool = False
    reached: bool = False
    answered: bool = False
    flooded: bool = False
    _received_bytes: int = 0

    @property
    def destination(self) -> Destination:
        return destination_of(self.url)

    def takes(self, count: int) -> bool:
        """Whether so many more bytes may come in. Those that complete the head may bring the body with them."""
        wire_limit_bytes = HEAD_LIMIT_BYTES + FRAMING_FACTOR * self.answer_limit_bytes
        limit_bytes = wire_limit_bytes if self.answered else HEAD_LIMIT_BYTES
        self.flooded = self._received_bytes > limit_bytes
        self._received_bytes += count
        return not self.flooded


def destination_of(url: URL) -> Destination:
    """Where the connector will go for it."""
    assert url.raw_host is not None
    assert url.port is not None
    return Destination(url.scheme, url.raw_host, url.port)


journey: contextvars.ContextVar[Journey] = contextvars.ContextVar("external_agents.webhook.journey")
"""Of the request that the current task sends; no connection is opened without one."""
