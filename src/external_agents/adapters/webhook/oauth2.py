"""
Tokens by the OAuth 2.0 client credentials grant (RFC 6749, section 4.4), kept until they expire.

The client authenticates by HTTP Basic, which every server has to take (section 2.3.1). In practice some are set to
take the secret in the body alone. So where a client is refused, it is tried in the other way, once, at the same
endpoint, and the way that worked is remembered.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections import OrderedDict
from typing import TypeAlias
from urllib.parse import quote_plus, urlencode
from uuid import UUID

import attrs

from external_agents.adapters.webhook.answer import Answer
from external_agents.adapters.webhook.failures import Unanswered
from external_agents.adapters.webhook.outbound import Outbound, Post
from external_agents.adapters.webhook.token_answer import Token, failure_of, read_token, wants_other_authentication
from external_agents.domain.auth import ClientCredentials
from external_agents.domain.invocation import ErrorCode, Outcome
from external_agents.ports.system import Clock

TOKENS_MAX = 10_000
TOKEN_TIMEOUT_S = 30.0
TOKEN_ANSWER_LIMIT_BYTES = 64 * 1024

_Key: TypeAlias = tuple[str | None, ...]


@attrs.frozen(kw_only=True)
class Grant:
    """What a token is for. Nothing is shared between organisations, or between agents."""

    org_id: str
    agent_id: UUID
    credentials: ClientCredentials

    @property
    def key(self) -> _Key:
        client = self.credentials
        secret = hashlib.sha256(client.client_secret.encode("utf-8", "surrogatepass")).hexdigest()
        agent = (self.org_id, str(self.agent_id))
        return (*agent, client.token_url, client.client_id, secret, client.scope, client.audience)


@attrs.define(eq=False)
class _Entry:
    token: Token | None = None
    flight: asyncio.Task[Token | Outcome] | None = None
    secret_in_body: bool = False


class Tokens:
    """
    The tokens of this process.

    However many ask for one at a time, one request is under way for it. It belongs to none of them: whoever stops
    waiting stops nothing. A failure is told to all who waited for it, and not kept.
    """

    def __init__(self, outbound: Outbound, clock: Clock, *, tokens_max: int = TOKENS_MAX) -> None:
        self._outbound = outbound
        self._clock = clock
        self._tokens_max = tokens_max
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()
        self._flights: set[asyncio.Task[Token | Outcome]] = set()

    async def token(self, grant: Grant, *, deadline_s: float, rejected: Token | None = None) -> Token:
        """
        Args:
            deadline_s: How long the caller waits, by the running loop's clock.
            rejected: A token that the agent did not take. This very object: a provider may give the same text again.

        Raises:
            Unanswered: There is none; with the outcome that it amounts to.
        """
        entry = self._entry(grant)
        token = entry.token
        if token is not None and token is not rejected and self._clock.monotonic_s() < token.kept_until_s:
            return token
        flight = entry.flight or self._start(entry, grant)
        try:
            async with asyncio.timeout_at(deadline_s):
                result = await asyncio.shield(flight)
        except TimeoutError:
            message = "The token endpoint did not answer in time."
            raise Unanswered(Outcome(error=ErrorCode.TIMEOUT, message=message)) from None
        if isinstance(result, Outcome):
            raise Unanswered(result)
        return result

    async def aclose(self) -> None:
        flights = list(self._flights)
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)

    def _entry(self, grant: Grant) -> _Entry:
        key = grant.key
        entry = self._entries.setdefault(key, _Entry())
        self._entries.move_to_end(key)
        if len(self._entries) > self._tokens_max:
            self._entries.popitem(last=False)
        return entry

    def _start(self, entry: _Entry, grant: Grant) -> asyncio.Task[Token | Outcome]:
        flight = entry.flight = asyncio.create_task(self._fly(entry, grant))
        self._flights.add(flight)
        flight.add_done_callback(self._flights.discard)
        return flight

    async def _fly(self, entry: _Entry, grant: Grant) -> Token | Outcome:
        try:
            entry.token = await self._obtain(entry, grant)
        except Unanswered as failure:
            return failure_of(failure.outcome)
        else:
            return entry.token
        finally:
            entry.flight = None

    async def _obtain(self, entry: _Entry, grant: Grant) -> Token:
        deadline_s = asyncio.get_running_loop().time() + TOKEN_TIMEOUT_S
        asked_at_s = self._clock.monotonic_s()
        answer = await self._ask(grant, entry.secret_in_body, deadline_s)
        if wants_other_authentication(answer):
            other = await self._ask(grant, not entry.secret_in_body, deadline_s)
            if other.is_success:
                answer, entry.secret_in_body = other, not entry.secret_in_body
        return read_token(answer, asked_at_s, self._clock.now())

    async def _ask(self, grant: Grant, secret_in_body: bool, deadline_s: float) -> Answer:
        client = grant.credentials
        headers = {"content-type": "application/x-www-form-urlencoded", "accept": "application/json"}
        fields = {"grant_type": "client_credentials", "scope": client.scope, "audience": client.audience}
        if secret_in_body:
            fields |= {"client_id": client.client_id, "client_secret": client.client_secret}
        else:
            headers["authorization"] = _basic(client)
        form = urlencode({name: value for name, value in fields.items() if value is not None})
        return await self._outbound.post(
            Post(
                to="The token endpoint",
                org_id=grant.org_id,
                url=client.token_url,
                headers=headers,
                body=form.encode("ascii"),
                answer_limit_bytes=TOKEN_ANSWER_LIMIT_BYTES,
                deadline_s=deadline_s,
            )
        )


def _basic(client: ClientCredentials) -> str:
    """Both halves are form-urlencoded first (RFC 6749, section 2.3.1)."""
    pair = f"{quote_plus(client.client_id)}:{quote_plus(client.client_secret)}"
    return f"Basic {base64.b64encode(pair.encode('ascii')).decode('ascii')}"
