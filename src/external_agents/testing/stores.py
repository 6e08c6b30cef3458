"""What the suites of repositories and ledgers work on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import TypeAlias

import attrs

from external_agents.ports.ledger import InvocationLedger
from external_agents.ports.repositories import AgentReader, AgentWriter, InvocationReader

PassTime: TypeAlias = Callable[[float], Awaitable[None]]
"""Returns when the store takes everything that it holds for so many seconds older: windows, leases."""


@attrs.frozen(kw_only=True)
class Store:
    """
    One store behind its ports.

    Attributes:
        new_ledger: Opens the ledger of one more instance and sends its first heartbeat. The fixture closes it.
        now: The store's own time of day, aware, in UTC.
    """

    agent_reader: AgentReader
    agent_writer: AgentWriter
    invocation_reader: InvocationReader
    new_ledger: Callable[[], Awaitable[InvocationLedger]]
    now: Callable[[], datetime]
