"""What the tests of the webhook transport share: a transport that may reach the loopback address, and requests."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from ipaddress import ip_address
from uuid import UUID

from external_agents.adapters.memory.system import SystemClock
from external_agents.adapters.webhook.resolver import Resolve
from external_agents.adapters.webhook.transport import WebhookTransport
from external_agents.domain.auth import ClientCredentials, Credentials, FixedHeaders
from external_agents.domain.egress import Address, EgressPolicy
from external_agents.domain.json_values import JsonText
from external_agents.ports.transport import AgentRequest

AGENT_ID = UUID("018f0000-0000-7000-8000-000000000001")
LIMIT_BYTES = 64 * 1024


class MovableClock(SystemClock):
    """The machine's clock, ahead by as much as a test says."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self.ahead_s


class Names:
    """A resolver with a list of answers for each name; the last one stays."""

    def __init__(self, **answers: Sequence[Sequence[str]]) -> None:
        self._answers = {name.replace("_", "."): [list(answer) for answer in given] for name, given in answers.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, org_id: str) -> Sequence[Address]:
        self.asked.append(host)
        answers = self._answers.get(host)
        if not answers:
            raise OSError("no such name")
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        return [ip_address(address) for address in answer]


@contextlib.asynccontextmanager
async def open_transport(
    allow: str = "loopback",
    *,
    ports: str = "443,8443",
    limit_bytes: int = LIMIT_BYTES,
    clock: SystemClock | None = None,
    resolve: Resolve | None = None,
    ssl_context: ssl.SSLContext | None = None,
) -> AsyncIterator[WebhookTransport]:
    transport = WebhookTransport(
        EgressPolicy.parse(allow, ports),
        answer_limit_bytes=limit_bytes,
        clock=clock or SystemClock(),
        resolve=resolve,
        ssl_context=ssl_context,
    )
    try:
        # The first exchange prepares TLS and the pool; a deadline in a test should be about something else.
        await transport.exchange(request_to("http://127.0.0.1:1/", timeout_s=20))
        yield transport
    finally:
        await transport.aclose()


def request_to(
    url: str,
    *,
    body: str | bytes = b'{"input": "hello"}',
    headers: Mapping[str, str] | None = None,
    credentials: Credentials | None = None,
    timeout_s: float = 20.0,
    org_id: str = "acme",
    agent_id: UUID = AGENT_ID,
) -> AgentRequest:
    return AgentRequest(
        org_id=org_id,
        agent_id=agent_id,
        url=url,
        body=JsonText.parse(body.encode() if isinstance(body, str) else body),
        headers=headers or {},
        credentials=credentials or FixedHeaders({}),
        timeout_s=timeout_s,
    )


def client_of(token_url: str, **changes: str) -> ClientCredentials:
    return ClientCredentials(**{"token_url": token_url, "client_id": "kaizen", "client_secret": "s3cret", **changes})
