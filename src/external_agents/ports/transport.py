"""Reaching the agent."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Protocol
from uuid import UUID

import attrs

from external_agents.domain.auth import Credentials
from external_agents.domain.invocation import Outcome
from external_agents.domain.json_values import JsonText


@attrs.frozen(kw_only=True)
class AgentRequest:
    """
    One POST to an agent.

    Attributes:
        headers: Beside the ones that `credentials` and HTTP itself call for.
        timeout_s: What the exchange may take in total: name resolution, connection, token, request, whole answer.
    """

    org_id: str
    agent_id: UUID
    url: str
    body: JsonText
    headers: Mapping[str, str]
    credentials: Credentials
    timeout_s: float


class AgentTransport(Protocol):
    """
    One HTTP exchange with an agent.

    It does not follow redirects, does not retry (but for one new token after a 401 with client credentials), refuses
    addresses that are not allowed, answers over the limit and encoded ones. It raises nothing for what an agent, its
    network or its token endpoint does: all of that is an Outcome.
    """

    @abstractmethod
    async def exchange(self, request: AgentRequest) -> Outcome: ...
