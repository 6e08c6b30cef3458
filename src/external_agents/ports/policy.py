"""Deciding who may do what."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol

from external_agents.domain.access import AccessRequest, Decision


class PolicyDecisionPoint(Protocol):
    """
    Decides access requests.

    It raises nothing: whatever goes wrong while deciding makes the decision a denial, with the reason in its `errors`.
    """

    @property
    @abstractmethod
    def judges_lists_by_agent(self) -> bool:
        """Whether policies may tell agents of one organisation apart, so that a list holds the permitted ones only."""
        ...

    @abstractmethod
    async def decide(self, requests: Sequence[AccessRequest]) -> Sequence[Decision]:
        """One decision for each request, in their order."""
        ...
