"""Where an issuer publishes its keys."""

from __future__ import annotations

import asyncio
import ssl

import aiohttp
import certifi
from aiohttp.http_exceptions import HttpProcessingError

from external_agents.adapters.identity.jwt.key_set import KeySet, KeySetUnavailable

FETCH_TIMEOUT_S = 4.0
"""So that a caller whose token waits for it is answered within 5 s."""
DOCUMENT_LIMIT_BYTES = 512 * 1024

_HEADERS = {"Accept": "application/jwk-set+json, application/json", "Accept-Encoding": "identity"}


class JwksEndpoint:
    """
    A URL that the operator chose. So the egress rules do not hold for it; and as it redirects nowhere, for no other.

    Args:
        timeout_s: Of the whole exchange.
        ssl_context: Whom to trust; by default the machine's authorities and certifi's.
    """

    def __init__(
        self, url: str, *, timeout_s: float = FETCH_TIMEOUT_S, ssl_context: ssl.SSLContext | None = None
    ) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._ssl_context = ssl_context or (_default_ssl_context() if url.lower().startswith("https:") else True)

    async def fetch(self) -> KeySet:
        """
        Raises:
            KeySetUnavailable: It cannot be reached, or does not answer with a JWK set.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                document = await self._get()
        except TimeoutError:
            raise KeySetUnavailable(f"it does not answer within {self._timeout_s:g} s") from None
        except (aiohttp.ClientError, HttpProcessingError, OSError, ValueError) as error:
            raise KeySetUnavailable(f"it cannot be reached: {' '.join(str(error).split())}") from None
        return KeySet.parse(document)

    async def _get(self) -> bytes:
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=self._ssl_context, force_close=True),
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
                auto_decompress=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
            ) as session,
            session.get(self._url, headers=_HEADERS, allow_redirects=False) as response,
        ):
            if response.status != 200:
                raise KeySetUnavailable(f"it answers {response.status}")
            if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise KeySetUnavailable("its answer is encoded, although it was asked not to be")
            document = bytearray()
            async for chunk in response.content.iter_any():
                document += chunk
                if len(document) > DOCUMENT_LIMIT_BYTES:
                    raise KeySetUnavailable(f"its answer has over {DOCUMENT_LIMIT_BYTES} bytes")
        return bytes(document)


def _default_ssl_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context
