"""One connection to Redis: opened when it is needed, bounded in time, its errors in the library's words."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, TypeAlias

from redis.asyncio.connection import AbstractConnection, Connection, parse_url
from redis.exceptions import NoScriptError, RedisError, ResponseError

from external_agents.domain.errors import ConfigurationError, Unavailable

CALL_TIMEOUT_S = 1.5
"""For everything about one call: connecting, sending, and all of its answers."""
WHAT = "The rate limiter"

Command: TypeAlias = tuple[str | bytes | int, ...]
Reply: TypeAlias = Any
"""What RESP 2 holds: bytes, an integer, None, a list of these; or the error that this one command came to."""

# Not left to the URL. A call that was sent and not answered may have been carried out, and is not repeated. A new
# connection needs no command but AUTH and SELECT.
_OPTIONS: dict[str, Any] = {
    "socket_timeout": None,
    "socket_connect_timeout": CALL_TIMEOUT_S,
    "retry": None,
    "retry_on_timeout": False,
    "retry_on_error": [],
    "health_check_interval": 0,
    "decode_responses": False,
    "client_name": None,
    "driver_info": None,
    "protocol": 2,
}


class RedisConnection:
    """
    For one caller at a time: what is sent together is answered together.

    Nothing connects before the first call; a connection that broke is opened anew by the next one.
    """

    def __init__(self, url: str) -> None:
        """
        Args:
            url: `redis://`, `rediss://` or `unix://`, as redis-py takes it.

        Raises:
            ConfigurationError: It is none of these. The message does not repeat it: it may hold a password.
        """
        self._connection = _connection(url)

    async def call(self, commands: Sequence[Command]) -> list[Reply]:
        """
        Send all of them in one round trip.

        Returns:
            An answer to each, in their order. A `ResponseError` in its place: the server refused this one.

        Raises:
            Unavailable: There is no answer, or none in time. What was sent may have been carried out all the same.
        """
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await self._exchange(commands)
        except (RedisError, OSError, TimeoutError) as error:
            await self.aclose()  # What is left of its answers must not be taken for another call's.
            raise Unavailable(WHAT) from error
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        await self._connection.disconnect(nowait=True)

    async def _exchange(self, commands: Sequence[Command]) -> list[Reply]:
        connection = self._connection
        if connection.is_connected and await connection.can_read():
            await connection.disconnect(nowait=True)  # The server has closed it, or speaks without being asked.
        if not connection.is_connected:
            await connection.connect()  # type: ignore[no-untyped-call]
        await connection.send_packed_command(connection.pack_commands(commands))
        replies: list[Reply] = []
        for _ in commands:
            try:
                replies.append(await connection.read_response())
            except ResponseError as error:
                replies.append(error)
        return replies


def was_not_loaded(reply: Reply) -> bool:
    """Whether the command came to nothing only because the server does not know the script."""
    return isinstance(reply, NoScriptError)


def _connection(url: str) -> AbstractConnection:
    try:
        options: dict[str, Any] = {**parse_url(url), **_OPTIONS}
        kind = options.pop("connection_class", Connection)
        connection: AbstractConnection = kind(**options)
    except (TypeError, ValueError, RedisError):
        raise ConfigurationError(
            "The URL of Redis is not valid: redis-py does not take it, or a parameter in it."
        ) from None
    return connection
