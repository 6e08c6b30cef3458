"""A ledger whose rate limits live elsewhere."""

from __future__ import annotations

import logging
from uuid import UUID

import attrs

from external_agents.domain.errors import AdmissionInDoubt, ExternalAgentsError, Unavailable
from external_agents.domain.invocation import ExternalAgentInvocation
from external_agents.domain.refusals import BudgetExceeded, RateLimited
from external_agents.ports.ledger import Admission, AdmissionRequest, Forecast, InvocationLedger
from external_agents.ports.rate_limiter import Place, RateLimiter

_log = logging.getLogger(__name__)


class LimitedLedger(InvocationLedger):
    """
    Any ledger, with the windows of a `RateLimiter` in place of its own.

    The place is taken first. What then stands against the admission gives it back, once; until then it counts, and
    another caller may be refused for want of it. A crash between the two, or a doubt whether the invocation was
    admitted, costs one place for its window and never gives one too many.
    """

    def __init__(self, ledger: InvocationLedger, limiter: RateLimiter) -> None:
        self._ledger = ledger
        self._limiter = limiter

    async def admit(self, request: AdmissionRequest) -> Admission:
        try:
            place = await self._limiter.acquire(request.org_id, request.agent_id, request.agent.limits)
        except RateLimited as refusal:
            # The ledger raises it, unless something stands before it or the answer is an earlier invocation's.
            admission = await self._ledger.admit(attrs.evolve(request, verdict=refusal))
            return attrs.evolve(admission, quotas=refusal.quotas)
        return await self._admit(attrs.evolve(request, verdict=place), place)

    async def _admit(self, request: AdmissionRequest, place: Place) -> Admission:
        try:
            admission = await self._ledger.admit(request)
        except AdmissionInDoubt:
            raise
        except BudgetExceeded:
            await self._give_back(place)
            raise BudgetExceeded(place.quotas.given_back()) from None
        except ExternalAgentsError:
            await self._give_back(place)
            raise
        if not admission.replayed:
            return admission
        await self._give_back(place)
        return attrs.evolve(admission, quotas=place.quotas.given_back())

    async def settle(self, finished: ExternalAgentInvocation) -> ExternalAgentInvocation:
        return await self._ledger.settle(finished)

    async def record(self, finished: ExternalAgentInvocation) -> None:
        await self._ledger.record(finished)

    async def forecast(self, org_id: str, agent_id: UUID) -> Forecast:
        forecast = await self._ledger.forecast(org_id, agent_id)
        limits = {quota.window: quota.limit for quota in forecast.quotas.quotas}
        standing = await self._limiter.peek(org_id, agent_id, limits)
        return attrs.evolve(forecast, quotas=standing.quotas, rate_limited=standing.rate_limited)

    async def heartbeat(self) -> None:
        await self._ledger.heartbeat()

    def holds_lease(self) -> bool:
        return self._ledger.holds_lease()

    async def recover(self) -> int:
        return await self._ledger.recover()

    async def _give_back(self, place: Place) -> None:
        try:
            await self._limiter.release(place)
        except Unavailable as outage:
            _log.warning("a place that was not used is lost for its window: %s", outage)
