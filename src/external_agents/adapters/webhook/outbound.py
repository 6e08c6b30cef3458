"""One POST to a tenant's URL: within a deadline, past the egress guard, its answer within a limit."""

from __future__ import annotations

import asyncio
import io
import ssl
from collections.abc import Mapping
from functools import cache, lru_cache
from importlib.metadata import version
from urllib.parse import quote, urlsplit

import aiohttp
import attrs
import certifi
import idna
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from external_agents.adapters.webhook import failures
from external_agents.adapters.webhook.answer import Answer, TooLarge, fields_of, is_encoded, read_body
from external_agents.adapters.webhook.connector import GuardedConnector
from external_agents.adapters.webhook.egress import EgressGuard, log_refusal
from external_agents.adapters.webhook.journey import Journey, destination_of, journey
from external_agents.adapters.webhook.resolver import Resolve, SystemResolver
from external_agents.domain.egress import Destination, EgressPolicy

URLS_REMEMBERED = 4096
READ_BUFFER_BYTES = 64 * 1024

_DEFAULT_HEADERS = {"accept": "*/*", "user-agent": f"external-agents/{version('external-agents')}"}
_FIXED_HEADERS = {"accept-encoding": "identity"}
_NETWORK_ERRORS = (aiohttp.ClientError, HttpProcessingError, OSError)
_QUERY = "".join(char for char in map(chr, range(0x21, 0x7F)) if char not in '"<>')
_PATH = "".join(char for char in _QUERY if char not in "^`{}")
_WHOLE_BODY_BYTES = 1024 * 1024
"""A larger body is handed over in pieces, between which the event loop has its turn."""


@attrs.frozen(kw_only=True)
class Post:
    """
    Attributes:
        org_id: Whose URL it is.
        headers: By names in lower case, in which they are sent.
        to: Who is at the other end, for messages: `The agent`.
        deadline_s: When it must be over, by the running loop's clock.
    """

    to: str
    org_id: str
    url: str
    headers: Mapping[str, str] = attrs.field(repr=False)
    body: bytes = attrs.field(repr=False)
    answer_limit_bytes: int
    deadline_s: float


@attrs.frozen
class _Target:
    """A URL as it was written; or what is wrong with it."""

    url: URL
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
        self._session: aiohttp.ClientSession | None = None
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
        current = Journey(target.url, post.answer_limit_bytes, post.org_id)
        token = journey.set(current)
        try:
            async with asyncio.timeout_at(post.deadline_s):
                return await self._exchange(post, current)
        except TimeoutError:
            raise failures.late(post.to, current) from None
        except _NETWORK_ERRORS as error:
            raise failures.broken(post.to, current, error) from None
        finally:
            journey.reset(token)

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()
        await self._system_resolver.aclose()

    async def _exchange(self, post: Post, current: Journey) -> Answer:
        headers = {**_DEFAULT_HEADERS, **post.headers, **_FIXED_HEADERS}
        body = post.body if len(post.body) <= _WHOLE_BODY_BYTES else io.BytesIO(post.body)
        exchange = self._opened().request("POST", current.url, data=body, headers=headers, allow_redirects=False)
        async with exchange as response:
            current.answered = True
            if response.status <= 199:
                raise failures.switched_protocols(post.to)
            fields = fields_of(response.raw_headers)
            if is_encoded(fields):
                raise failures.encoded(post.to, response.status)
            try:
                answer = await read_body(response.content.iter_any(), fields, post.answer_limit_bytes)
            except TooLarge:
                raise failures.too_large(post.to, response.status, post.answer_limit_bytes) from None
        return Answer(response.status, fields, answer)

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = _session(self._guard, self._ssl_context or default_ssl_context())
        return self._session

    def _parsed(self, url: str) -> _Target:
        faults = self._policy.url_faults(url)
        if faults:
            return _Target(URL(), faults[0])
        try:
            target = URL(_encoded(url), encoded=True)
        except (ValueError, idna.IDNAError):
            return _Target(URL(), "is not a valid URL")
        # The name is another text now, and was taken apart by another parser: it is judged as it will be asked for.
        asked_for = f"{target.scheme}://{target.raw_authority}/"
        faults = self._policy.url_faults(asked_for)
        if faults or destination_of(target) != Destination.of(asked_for):
            return _Target(URL(), faults[0] if faults else "is not a valid URL")
        return _Target(target)


def _encoded(url: str) -> str:
    """
    The URL as it goes over the wire: what was written, but for what has no place there.

    That is percent-encoded as the URL Standard's path and query sets say, and a name beyond ASCII is in its ASCII form
    (IDNA 2008).
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    netloc = parts.netloc
    if not host.isascii():
        netloc = idna.encode(host).decode("ascii") + (f":{parts.port}" if parts.port else "")
    query = f"?{quote(parts.query, safe=_QUERY)}" if "?" in url else ""
    return f"{parts.scheme}://{netloc}{quote(parts.path, safe=_PATH)}{query}"


def _session(guard: EgressGuard, context: ssl.SSLContext) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=GuardedConnector(guard, context),
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        auto_decompress=False,
        read_bufsize=READ_BUFFER_BYTES,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # The whole exchange has a deadline.
    )


@cache
def default_ssl_context() -> ssl.SSLContext:
    """
    The machine's authorities, to which an operator can add; and certifi's, for machines that have none.

    Reading them takes a tenth of a second, once in a process: who serves does it before the first call.
    """
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    context.set_alpn_protocols(["http/1.1"])
    return context
