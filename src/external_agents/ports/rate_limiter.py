"""Rate limits that live outside the ledger's store."""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol
from uuid import UUID

import attrs

from external_agents.domain.rate_limit import Limits, RateQuotas


@attrs.frozen
class Place:
    """
    A place taken in an agent's windows, to be kept or given back.

    Attributes:
        quotas: As the limits stand with this place taken.
        token: The limiter's own note of what was taken where.
    """

    quotas: RateQuotas
    token: object = attrs.field(repr=False)


@attrs.frozen
class Standing:
    """How an agent's limits stand, and whether they would admit one more now."""

    quotas: RateQuotas
    rate_limited: bool


class RateLimiter(Protocol):
    """
    Windows of a minute, an hour and a day, taken together: all or nothing, over all processes.

    In no stretch of a window's length are more places taken than its limit; one comes free at most 2 % of the window
    late. The windows count whether or not a limit is set, so that a limit added later knows what was taken before.

    Raises:
        Unavailable: The store cannot be reached, and nothing may be admitted. A place may have been taken: then it is
            lost for its window, never given twice. From every method.
    """

    @abstractmethod
    async def acquire(self, org_id: str, agent_id: UUID, limits: Limits) -> Place:
        """
        Take a place in all three windows.

        Raises:
            RateLimited: A window is full; nothing was taken.
        """
        ...

    @abstractmethod
    async def release(self, place: Place) -> None:
        """Give a place back that was not used; once, however often it is called."""
        ...

    @abstractmethod
    async def peek(self, org_id: str, agent_id: UUID, limits: Limits) -> Standing:
        """Takes nothing."""
        ...
