"""Agents that live in this process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from external_agents.domain.invocation import ErrorCode, Outcome
from external_agents.ports.transport import AgentRequest, AgentTransport

AgentFunction: TypeAlias = Callable[[AgentRequest], Awaitable[Outcome]]

_log = logging.getLogger(__name__)


class FunctionTransport(AgentTransport):
    """
    Calls a coroutine function in place of HTTP, for embedding and tests.

    The function takes an AgentRequest and returns an Outcome. It is cancelled when its time is up. An exception that it
    raises is an answer of 500.
    """

    def __init__(self, function: AgentFunction) -> None:
        self._function = function

    async def exchange(self, request: AgentRequest) -> Outcome:
        deadline = asyncio.timeout(request.timeout_s)
        try:
            async with deadline:
                return await self._function(request)
        except Exception as error:
            if deadline.expired():
                return Outcome(error=ErrorCode.TIMEOUT, message="The agent did not answer in time.", may_have_run=True)
            _log.warning("the function of agent %s raised", request.agent_id, exc_info=error)
            return Outcome(error=ErrorCode.HTTP_STATUS, status=500, message=f"The agent raised {type(error).__name__}.")
