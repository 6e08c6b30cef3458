"""What the core may not take from the machine by itself: the time, ids, chance."""

from __future__ import annotations

from abc import abstractmethod
from datetime import datetime
from typing import Protocol
from uuid import UUID


class Clock(Protocol):
    @abstractmethod
    def now(self) -> datetime:
        """The time of day, aware, in UTC."""
        ...

    @abstractmethod
    def monotonic_s(self) -> float:
        """Seconds from an arbitrary start; never goes back."""
        ...

    @abstractmethod
    async def sleep(self, seconds: float) -> None: ...


class IdSource(Protocol):
    @abstractmethod
    def new_id(self) -> UUID:
        """A UUIDv7 (RFC 9562): unique, growing with time."""
        ...

    @abstractmethod
    def new_trace_id(self) -> str:
        """32 lower-case hex digits, not all zero (W3C Trace Context)."""
        ...

    @abstractmethod
    def jitter(self) -> float:
        """Uniform in [0, 1)."""
        ...
