"""The agent transport over HTTP."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping

import attrs

from external_agents.adapters.webhook.answer import outcome_of
from external_agents.adapters.webhook.failures import Unanswered
from external_agents.adapters.webhook.oauth2 import Grant, Tokens
from external_agents.adapters.webhook.outbound import Outbound, Post
from external_agents.adapters.webhook.resolver import Resolve
from external_agents.domain.auth import ClientCredentials, FixedHeaders
from external_agents.domain.egress import EgressPolicy
from external_agents.domain.http_fields import tenant_may_set
from external_agents.domain.invocation import ErrorCode, Outcome
from external_agents.ports.system import Clock
from external_agents.ports.transport import AgentRequest, AgentTransport


class WebhookTransport(AgentTransport):
    """
    POSTs to agents under the egress rules, over connections that are kept alive.

    Connections are opened at the first use and belong to the event loop that runs then; `aclose` closes them, after the
    last exchange.

    Args:
        answer_limit_bytes: The largest body taken from an agent.
        resolve: Where names are looked up; the system's resolver by default.
        ssl_context: Whom to trust; by default the machine's authorities and certifi's.
    """

    def __init__(
        self,
        policy: EgressPolicy,
        *,
        answer_limit_bytes: int,
        clock: Clock,
        resolve: Resolve | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._answer_limit_bytes = answer_limit_bytes
        self._clock = clock
        self._outbound = Outbound(policy, resolve=resolve, ssl_context=ssl_context)
        self._tokens = Tokens(self._outbound, clock)

    async def exchange(self, request: AgentRequest) -> Outcome:
        if request.timeout_s <= 0:
            return Outcome(error=ErrorCode.TIMEOUT, message="There was no time left to reach the agent.")
        deadline_s = asyncio.get_running_loop().time() + request.timeout_s
        if isinstance(request.credentials, FixedHeaders):
            return await self._post(request, request.credentials.headers, deadline_s)
        try:
            return await self._post_with_token(request, request.credentials, deadline_s)
        except Unanswered as failure:
            return failure.outcome

    async def aclose(self) -> None:
        await self._tokens.aclose()
        await self._outbound.aclose()

    async def _post_with_token(self, request: AgentRequest, client: ClientCredentials, deadline_s: float) -> Outcome:
        grant = Grant(org_id=request.org_id, agent_id=request.agent_id, credentials=client)
        token = await self._tokens.token(grant, deadline_s=deadline_s)
        outcome = await self._post(request, _bearer(token.text), deadline_s)
        if outcome.status != 401:
            return outcome
        token = await self._tokens.token(grant, deadline_s=deadline_s, rejected=token)
        outcome = await self._post(request, _bearer(token.text), deadline_s)
        if outcome.status != 401:
            return outcome
        message = "The agent answered 401, to a new token as well."
        return attrs.evolve(outcome, error=ErrorCode.AGENT_AUTH_FAILED, message=message)

    async def _post(self, request: AgentRequest, credentials: Mapping[str, str], deadline_s: float) -> Outcome:
        # They were checked at registration; an auth type that somebody has added may know no such check.
        headers = {name.lower(): value for name, value in credentials.items() if tenant_may_set(name)}
        headers |= {name.lower(): value for name, value in request.headers.items()}
        headers["content-type"] = "application/json"
        post = Post(
            to="The agent",
            org_id=request.org_id,
            url=request.url,
            headers=headers,
            body=request.body.text.encode("utf-8"),
            answer_limit_bytes=self._answer_limit_bytes,
            deadline_s=deadline_s,
        )
        try:
            answer = await self._outbound.post(post)
        except Unanswered as failure:
            return failure.outcome
        return outcome_of(answer, self._clock.now())


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}
