"""One POST to a tenant's URL: within a deadline, past the egress guard, its answer within a limit."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING

import aiohttp
import attrs
import certifi
import httpx
from aiohttp.http_exceptions import HttpProcessingError
from httpx_aiohttp import AiohttpTransport
from yarl import URL

from external_agents.adapters.webhook import failures
from external_agents.adapters.webhook.answer import Answer, TooLarge, fields_of, is_encoded, read_body
from external_agents.adapters.webhook.connector import GuardedConnector
from external_agents.adapters.webhook.egress import EgressGuard, log_refusal
from external_agents.adapters.webhook.journey import Journey, journey
from external_agents.adapters.webhook.resolver import Resolve, SystemResolver
from external_agents.domain.egress import EgressPolicy

if TYPE_CHECKING:
    from aiohttp.connector import Connection

URLS_REMEMBERED = 4096
READ_BUFFER_BYTES = 64 * 1024

_DEFAULT_HEADERS = {"accept": "*/*", "user-agent": f"external-agents/{version('external-agents')}"}
_FIXED_HEADERS = {"accept-encoding": "identity"}
_NETWORK_ERRORS = (httpx.TransportError, aiohttp.ClientError, HttpProcessingError, OSError)


@attrs.frozen(kw_only=True)
class Post:
    """
    Attributes:
        headers: By names in lower case, in which they are sent.
        to: Who is at the other end, for messages: `The agent`.
        deadline_s: When it must be over, by the running loop's clock.
    """

    to: str
    url: str
    headers: Mapping[str, str] = attrs.field(repr=False)
    body: bytes = attrs.field(repr=False)
    answer_limit_bytes: int
    deadline_s: float


@attrs.frozen
class _Target:
    """A URL as httpx takes it, and the same as it was written; or what is wrong with it."""

    url: httpx.URL
    exact_url: URL
    fault: str | None = None


class Outbound:
    """Guarded connections to everywhere, one pool of them, opened at the first use on the running loop."""

    def __init__(
        self, policy: EgressPolicy, *, resolve: Resolve | None = None, ssl_context: ssl.SSLContext | None = None
    ) -> None:
        self._policy = policy
        self._system_resolver = SystemResolver()
        self._guard = EgressGuard(policy, resolve or self._system_resolver)
        self._ssl_context = ssl_context
        self._transport: AiohttpTransport | None = None
        self._target = lru_cache(maxsize=URLS_REMEMBERED)(self._parsed)

    async def post(self, post: Post) -> Answer:
        """
        Raises:
            Unanswered: With the outcome that it amounts to.
        """
        target = self._target(post.url)
        if target.fault:
            log_refusal(post.url, target.fault)
            raise failures.refused(post.to)
        current = Journey(target.exact_url, post.answer_limit_bytes)
        token = journey.set(current)
        try:
            async with asyncio.timeout_at(post.deadline_s):
                return await self._exchange(post, target.url, current)
        except TimeoutError:
            raise failures.late(post.to, current) from None
        except _NETWORK_ERRORS as error:
            raise failures.broken(post.to, current, error) from None
        finally:
            journey.reset(token)

    async def aclose(self) -> None:
        if self._transport is not None:
            await self._transport.aclose()
        await self._system_resolver.aclose()

    async def _exchange(self, post: Post, url: httpx.URL, current: Journey) -> Answer:
        # The transport is called without an AsyncClient around it: redirects, cookies, proxies, netrc and decoding are
        # what a client adds, none of it is wanted here, and it costs a quarter of the rate.
        headers = {**_DEFAULT_HEADERS, **post.headers, **_FIXED_HEADERS, "content-length": str(len(post.body))}
        request = httpx.Request("POST", url, headers=headers, stream=httpx.ByteStream(post.body))
        response = await self._opened().handle_async_request(request)
        current.answered = True
        assert isinstance(response.stream, httpx.AsyncByteStream)
        try:
            if response.status_code <= 199:
                raise failures.switched_protocols(post.to)
            fields = fields_of(response.headers.raw)
            if is_encoded(fields):
                raise failures.encoded(post.to, response.status_code)
            body = await read_body(response.stream, fields, post.answer_limit_bytes)
        except TooLarge:
            raise failures.too_large(post.to, response.status_code, post.answer_limit_bytes) from None
        finally:
            await response.stream.aclose()
        return Answer(response.status_code, fields, body)

    def _opened(self) -> AiohttpTransport:
        if self._transport is None:
            context = self._ssl_context or _default_ssl_context()
            self._transport = AiohttpTransport(verify=context, client=lambda: _session(self._guard, context))
        return self._transport

    def _parsed(self, url: str) -> _Target:
        faults = self._policy.url_faults(url)
        if faults:
            return _Target(httpx.URL(), URL(), faults[0])
        try:
            parsed = httpx.URL(url)
            return _Target(parsed, URL(str(parsed), encoded=True))
        except (httpx.InvalidURL, ValueError):
            return _Target(httpx.URL(), URL(), "is not a valid URL")


class _Response(aiohttp.ClientResponse):
    """Without its reason phrase: it means nothing (RFC 9112, section 4), and httpx-aiohttp trips over some of them."""

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        await super().start(connection)
        self.reason = None
        return self


def _session(guard: EgressGuard, context: ssl.SSLContext) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=GuardedConnector(guard, context),
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        read_bufsize=READ_BUFFER_BYTES,
        response_class=_Response,
    )


def _default_ssl_context() -> ssl.SSLContext:
    """The machine's authorities, to which an operator can add; and certifi's, for machines that have none."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    context.set_alpn_protocols(["http/1.1"])
    return context
