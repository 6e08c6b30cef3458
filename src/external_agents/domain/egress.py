"""
Where requests to tenants' URLs may go: the shape of a URL at registration, the address at every call.

Sources: the IANA special-purpose address registries for IPv4 and IPv6 (RFC 6890 and its successors).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Protocol, TypeAlias
from urllib.parse import SplitResult, urlsplit

import attrs

from external_agents.domain.errors import ConfigurationError

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

URL_LENGTH_MAX = 2000

_WORDS: dict[str, tuple[str, ...]] = {
    "loopback": ("127.0.0.0/8", "::1/128"),
    "private": ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"),
}

_NOT_PUBLIC_V4 = tuple(
    map(
        IPv4Network,
        "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 168.63.129.16/32 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24"
        " 192.0.2.0/24 192.31.196.0/24 192.52.193.0/24 192.88.99.0/24 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15"
        " 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4".split(),
    )
)
_PUBLIC_V6 = IPv6Network("2000::/3")
_NOT_PUBLIC_V6 = tuple(map(IPv6Network, "2001::/23 2001:db8::/32 2002::/16 2620:4f:8000::/48 3fff::/20".split()))
_CARRIES_V4 = IPv6Network("64:ff9b::/96")

_LOCAL_SUFFIXES = (".localhost", ".local", ".internal", ".svc")
_HOST_NAME = re.compile(
    r"(?=.{1,253}\Z)[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?(?:\.[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?)*"
)
_NUMERIC_LABEL = re.compile(r"\d+|0x[0-9a-f]*")
_AUTHORITY = re.compile(r"(?:\[[0-9A-Fa-f:.]*\]|[^\[\]:]*)(?::[0-9]*)?")
"""Anything else means one host to one parser, and another to the next."""
_FORBIDDEN_IN_URL = re.compile(
    r"[\x00-\x20\x7f-\xa0\xad\u1680\u180e\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\ufeff\ufff9-\ufffb\\]"
)
_DEFAULT_PORTS = {"http": 80, "https": 443}


class UrlRules(Protocol):
    """What a tenant's URL must look like to be registered; a host may bring stricter ones."""

    def url_faults(self, url: str) -> list[str]:
        """What is wrong with `url`, each as a message for the tenant; empty when it may be registered."""
        ...


@attrs.frozen
class EgressPolicy:
    """
    The rules of this installation: public addresses on `ports`, and everything in `allow` on any port.

    An address in `allow` may be reached by any shape of name, over http or https; `localhost` is allowed as far as
    `allow` holds loopback addresses. The policy judges; opening the connection to the judged address is the
    transport's duty.
    """

    allow: tuple[Network, ...] = ()
    ports: frozenset[int] = frozenset({443, 8443})

    @classmethod
    def parse(cls, allow: str, ports: str = "443,8443") -> EgressPolicy:
        """
        From `loopback,10.1.0.0/16` and `443,8443`.

        Raises:
            ConfigurationError: A word that is neither a known one nor a CIDR, a port out of range.
        """
        return cls(allow=tuple(_networks(allow)), ports=frozenset(_ports(ports)))

    def permits(self, destination: Destination, address: Address) -> bool:
        """Whether a connection for `destination` may be opened to this very address."""
        if self.allows(address):
            return True
        named_publicly = literal_address(destination.host) is not None or _is_public_name(destination.host)
        by_rule = destination.scheme == "https" and destination.port in self.ports
        return named_publicly and by_rule and is_public(address)

    def allows(self, address: Address) -> bool:
        """Whether the operator has named this address."""
        plain = _unmapped(address)
        return not _has_zone(address) and any(
            plain in network for network in self.allow if network.version == plain.version
        )

    def localhost(self) -> tuple[Address, ...]:
        """What the name `localhost` stands for here: the loopback addresses that the operator has named."""
        return tuple(filter(self.allows, (IPv4Address("127.0.0.1"), IPv6Address("::1"))))

    def url_faults(self, url: str) -> list[str]:
        if not 0 < len(url) <= URL_LENGTH_MAX:
            return [f"must have 1 to {URL_LENGTH_MAX} characters"]
        if _FORBIDDEN_IN_URL.search(url):
            return ["must not contain spaces, control characters or backslashes"]
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            return ["is not a valid URL"]
        faults = list(self._shape_faults(url, parts, port))
        return faults or list(self._host_faults(Destination.of(url)))

    def _shape_faults(self, url: str, parts: SplitResult, port: int | None) -> Iterator[str]:
        schemes = ("https", "http") if self.allow else ("https",)
        if parts.scheme not in schemes:
            yield f"must begin with {' or '.join(f'{scheme}://' for scheme in schemes)}"
        if not parts.hostname:
            yield "must name a host"
        if "@" in parts.netloc:
            yield "must not contain user info"
        elif _AUTHORITY.fullmatch(parts.netloc) is None:
            yield "must name a valid host"
        if "#" in url:
            yield "must not have a fragment"
        if port == 0:
            yield "must not name port 0"

    def _host_faults(self, destination: Destination) -> Iterator[str]:
        if address := literal_address(destination.host):
            if not self.permits(destination, address):
                yield "must not lead to this address and port"
        elif host_name(destination.host) is None:
            yield "must name a valid host"
        elif not self.allow and not _is_public_name(destination.host):
            yield "must name a public host"


@attrs.frozen
class Destination:
    """Where a URL leads: what the secrets sent there are bound to."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Destination:
        """Of a URL that has passed `url_faults`."""
        parts = urlsplit(url)
        return cls(parts.scheme, (parts.hostname or "").lower(), parts.port or _DEFAULT_PORTS[parts.scheme])

    @property
    def origin(self) -> str:
        """`https://agent.example:443`"""
        return f"{self.scheme}://{self.host}:{self.port}"


def is_public(address: Address) -> bool:
    """Whether the address is globally reachable unicast; forms that carry an IPv4 address are judged by it."""
    if _has_zone(address):
        return False
    plain = _unmapped(address)
    if isinstance(plain, IPv4Address):
        return not any(plain in network for network in _NOT_PUBLIC_V4)
    return plain in _PUBLIC_V6 and not any(plain in network for network in _NOT_PUBLIC_V6)


def literal_address(host: str) -> Address | None:
    """The address that `host` spells out, if it is one; a zone id is no part of an address that a tenant may name."""
    try:
        address = ip_address(host)
    except ValueError:
        return None
    return None if _has_zone(address) else address


def host_name(host: str) -> str | None:
    """`host` in its ASCII form, or None when DNS could not resolve it or a resolver would read it as a number."""
    try:
        name = host.lower() if host.isascii() else host.encode("idna").decode("ascii").lower()
    except UnicodeError:
        return None
    if _HOST_NAME.fullmatch(name) is None or _NUMERIC_LABEL.fullmatch(name.rsplit(".", 1)[-1]):
        return None
    return name


def _is_public_name(host: str) -> bool:
    name = host_name(host)
    return name is not None and "." in name and not name.endswith(_LOCAL_SUFFIXES)


def _has_zone(address: Address) -> bool:
    return isinstance(address, IPv6Address) and address.scope_id is not None


def _unmapped(address: Address) -> Address:
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _CARRIES_V4:
            return IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _networks(allow: str) -> Iterator[Network]:
    for word in filter(None, (word.strip() for word in allow.split(","))):
        for cidr in _WORDS.get(word, (word,)):
            try:
                yield ip_network(cidr)
            except ValueError:
                raise ConfigurationError(
                    f"EXTERNAL_AGENTS_EGRESS_ALLOW: {word!r} is neither a CIDR nor one of {', '.join(_WORDS)}."
                ) from None


def _ports(ports: str) -> Iterator[int]:
    for word in filter(None, (word.strip() for word in ports.split(","))):
        if not word.isdecimal() or not 1 <= int(word) <= 65535:
            raise ConfigurationError(f"EXTERNAL_AGENTS_EGRESS_PORTS: {word!r} is no port (1 to 65535).")
        yield int(word)
