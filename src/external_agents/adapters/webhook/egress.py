"""
The guard at the door: which addresses a connection may be opened to.

It stands twice. Names are resolved here and every address of a name must pass; and every socket is created here, for an
address that is judged once more. The second place sees address literals, which never come to a resolver.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from aiohttp.abc import AbstractResolver, ResolveResult

from external_agents.adapters.webhook.journey import journey
from external_agents.adapters.webhook.resolver import Resolve
from external_agents.domain.egress import Address, Destination, EgressPolicy, is_public

ADDRESSES_MAX = 16
"""How many addresses of a name are tried."""

_log = logging.getLogger("external_agents.adapters.webhook")


class EgressRefused(OSError):
    """An address is not allowed. Without details: they are for the log, not for tenants."""

    def __init__(self) -> None:
        super().__init__("refused by the egress rules")


class EgressGuard(AbstractResolver):
    """Resolves names for the connector, and creates its sockets, under the policy."""

    def __init__(self, policy: EgressPolicy, resolve: Resolve) -> None:
        self._policy = policy
        self._resolve = resolve

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """
        Raises:
            EgressRefused: One of the addresses is not allowed.
            OSError: There are none.
        """
        addresses = await self._addresses(host)
        for address in addresses:
            self._judge(address)
        return [_resolved(host, address, port) for address in addresses[:ADDRESSES_MAX]]

    def open_socket(self, address_info: tuple[Any, ...]) -> socket.socket:
        """
        A socket for exactly this address.

        Raises:
            EgressRefused: It is not allowed.
        """
        family, kind, protocol, _, socket_address = address_info
        self._judge(ip_address(socket_address[0]))
        return socket.socket(family, kind, protocol)

    async def close(self) -> None:
        """The resolver belongs to whoever made it."""

    async def _addresses(self, host: str) -> Sequence[Address]:
        if host == "localhost":
            if addresses := self._policy.localhost():
                return addresses
            raise self._refusal("localhost stands for no address in EGRESS_ALLOW")
        addresses = tuple(await self._resolve(host, journey.get().org_id))
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "the name has no addresses")
        return addresses

    def _judge(self, address: Address) -> None:
        destination = journey.get().destination
        if not self._policy.permits(destination, address):
            raise self._refusal(_broken_rule(self._policy, destination, address))

    def _refusal(self, rule: str) -> EgressRefused:
        current = journey.get()
        current.refused = True
        _log.warning("egress to %s refused: %s", current.destination.origin, rule)
        return EgressRefused()


def log_refusal(url: str, fault: str) -> None:
    """For a URL that is refused by its looks; only its host is told, the rest may hold secrets."""
    _log.warning("egress to %r refused: the URL %s", _host_of(url), fault)


def _host_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _broken_rule(policy: EgressPolicy, destination: Destination, address: Address) -> str:
    """Of a destination that the policy does not permit."""
    if not is_public(address):
        return f"{address} is not public and not in EGRESS_ALLOW"
    if destination.scheme != "https":
        return f"{destination.scheme} is only for EGRESS_ALLOW, and {address} is not in it"
    if destination.port not in policy.ports:
        return f"port {destination.port} is not in EGRESS_PORTS, and {address} not in EGRESS_ALLOW"
    return f"the name is not a public one, and {address} not in EGRESS_ALLOW"


def _resolved(host: str, address: Address, port: int) -> ResolveResult:
    return ResolveResult(
        hostname=host,
        host=str(address),
        port=port,
        family=socket.AF_INET if address.version == 4 else socket.AF_INET6,
        proto=0,
        flags=socket.AI_NUMERICHOST,
    )
