"""Whether Redis can be worked with right now, and whether it remembers what it has acknowledged."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping

import attrs
from redis.exceptions import AskError, ClusterDownError

from external_agents.adapters.redis.connection import Command, RedisConnection, Reply
from external_agents.adapters.redis.windows import KEY_PREFIX, take, with_source
from external_agents.domain.errors import Unavailable

OLDEST_VERSION = (6, 2)
"""The first that sets a key's expiry to a moment (SET EXAT)."""

REQUIRED = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
"""With anything else a place that was given can be forgotten, in a crash or for want of memory, and given again."""

_LOOK = with_source(take(f"{KEY_PREFIX}{{readiness}}", 0, (-1, -1, -1)))
_COMMANDS: list[Command] = [
    _LOOK,
    ("INFO",),
    ("CLUSTER INFO",),
    *(("CONFIG GET", name) for name in REQUIRED),
]


@attrs.frozen(kw_only=True)
class RedisReadiness:
    """
    Attributes:
        outage: Why it cannot be reached, in the driver's words, which may name hosts but no password; None: it can.
        faults: What is wrong with it, each in a line without addresses that says how to mend it.
        unverified: Those of REQUIRED that it does not tell, as managed servers do not.
    """

    outage: str | None = None
    faults: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()

    @property
    def reason(self) -> str | None:
        """What stands against serving with it, for anybody to read; None: nothing."""
        return "Redis cannot be reached" if self.outage else "; ".join(self.faults) or None


class RedisCheck:
    """Looks when it is called, on a connection of its own; an outage is an answer, not an error."""

    def __init__(self, connection: RedisConnection) -> None:
        """
        Args:
            connection: For this check alone, which closes it.
        """
        self._connection = connection
        self._looking: asyncio.Task[RedisReadiness] | None = None

    async def __call__(self) -> RedisReadiness:
        """Those who ask at the same time get the same answer."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        return await asyncio.shield(self._looking)

    async def aclose(self) -> None:
        if self._looking is not None:
            await asyncio.wait([self._looking])
        await self._connection.aclose()

    async def _look(self) -> RedisReadiness:
        try:
            looked, info, cluster, *settings = await self._connection.call(_COMMANDS)
        except Unavailable as outage:
            return RedisReadiness(outage=str(outage.__cause__) or "it does not answer in time")
        told, about_cluster = _lines(info), _lines(cluster)
        values = _settings(told, settings)
        return RedisReadiness(
            faults=(*_faults(looked, told, about_cluster), *_forgetful(values)),
            unverified=tuple(name for name in REQUIRED if name not in values),
        )


def _lines(reply: Reply) -> Mapping[str, str]:
    """`INFO` is lines of `name:value`, and headings."""
    text = reply.decode("utf-8", "replace") if isinstance(reply, bytes) else ""
    pairs = (line.partition(":") for line in text.splitlines())
    return {name: value for name, separator, value in pairs if separator}


def _settings(told: Mapping[str, str], replies: list[Reply]) -> Mapping[str, str]:
    """What is known of REQUIRED: from CONFIG GET, and where that is not permitted, from INFO."""
    values = {}
    if "aof_enabled" in told:
        values["appendonly"] = "yes" if told["aof_enabled"] == "1" else "no"
    if "maxmemory_policy" in told:
        values["maxmemory-policy"] = told["maxmemory_policy"]
    for name, reply in zip(REQUIRED, replies, strict=True):
        if isinstance(reply, list) and len(reply) == 2:
            values[name] = bytes(reply[1]).decode("utf-8", "replace")
    return values


def _faults(looked: Reply, told: Mapping[str, str], about_cluster: Mapping[str, str]) -> Iterator[str]:
    if isinstance(looked, AskError | ClusterDownError) or int(about_cluster.get("cluster_size", "1")) > 1:
        yield "Redis is a part of a cluster: name a proxy that serves all of its slots"
    elif not isinstance(looked, bytes):
        yield "Redis does not run our script: give the account the commands EVAL, EVALSHA, GET, SET and TIME"
    if (version := told.get("redis_version")) and _version(version) < OLDEST_VERSION:
        yield f"Redis is {version}: {'.'.join(map(str, OLDEST_VERSION))} is the oldest that will do"
    if told.get("role") == "slave":
        yield "Redis is a replica: name the primary"
    if told.get("aof_last_write_status", "ok") != "ok":
        yield "Redis could not write its append-only file: look at its log and its disk"


def _forgetful(values: Mapping[str, str]) -> Iterator[str]:
    for name, wanted in REQUIRED.items():
        if (value := values.get(name, wanted)) != wanted:
            yield f"Redis may forget places that it gave: {name} is {value}, set it to {wanted}"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdecimal())
