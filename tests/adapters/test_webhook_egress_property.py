"""However a tenant spells it, no connection is opened to an address that a plain model refuses."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agents import serve_agent
from external_agents.domain.egress import Address, EgressPolicy, is_public
from external_agents.domain.invocation import ErrorCode
from webhooks import Names, client_of, open_transport, request_to

CLOSED_V4 = [
    (0x00000000, 0x00FFFFFF), (0x0A000000, 0x0AFFFFFF), (0x64400000, 0x647FFFFF), (0x7F000000, 0x7FFFFFFF),
    (0xA83F8110, 0xA83F8110), (0xA9FE0000, 0xA9FEFFFF), (0xAC100000, 0xAC1FFFFF), (0xC0000000, 0xC00000FF),
    (0xC0000200, 0xC00002FF), (0xC01FC400, 0xC01FC4FF), (0xC034C100, 0xC034C1FF), (0xC0586300, 0xC05863FF),
    (0xC0A80000, 0xC0A8FFFF), (0xC0AF3000, 0xC0AF30FF), (0xC6120000, 0xC613FFFF), (0xC6336400, 0xC63364FF),
    (0xCB007100, 0xCB0071FF), (0xE0000000, 0xFFFFFFFF),
]  # fmt: skip
CLOSED_V6 = [(0x20010000, 23), (0x20010DB8, 32), (0x20020000, 16), (0x3FFF0000, 20)]

EDGES = [edge + step for low, high in CLOSED_V4 for edge in (low, high) for step in (-1, 0, 1)]
IPV4 = st.sampled_from([number for number in EDGES if 0 <= number < 2**32]) | st.integers(0, 2**32 - 1)
IPV6 = st.builds(
    lambda head, tail: head << 96 | tail,
    st.sampled_from([0, 0x20010000, 0x20010DB8, 0x20020000, 0x26204F80, 0x3FFF0000, 0x26064700, 0xFE800000])
    | st.integers(0, 2**32 - 1),
    st.integers(0, 2**96 - 1) | st.integers(0, 2**32 - 1) | IPV4.map(lambda number: 0xFFFF << 32 | number),
)
PLAIN = IPV4.map(IPv4Address) | IPV6.map(IPv6Address)
ADDRESSES = PLAIN | IPV6.map(lambda number: IPv6Address(f"{IPv6Address(number)}%1"))


def model(address: Address) -> bool:
    """Public or not, by plain arithmetic."""
    if isinstance(address, IPv6Address) and address.scope_id:
        return False
    number = int(address)
    if isinstance(address, IPv6Address) and number >> 32 not in {0xFFFF, 0x0064FF9B << 64}:
        refused = any(number >> (128 - length) == head >> (32 - length) for head, length in CLOSED_V6)
        return number >> 125 == 1 and not refused and number >> 80 != 0x2620004F8000
    return not any(low <= number & 0xFFFFFFFF <= high for low, high in CLOSED_V4)


@settings(max_examples=1000, deadline=None)
@given(ADDRESSES)
def test_public_is_what_the_model_calls_public(address: Address) -> None:
    assert is_public(address) == model(address)


def spellings(address: Address) -> list[str]:
    """As a host in a URL; most of them are no valid ones."""
    number = int(address)
    if isinstance(address, IPv6Address):
        return [
            f"[{address}]",
            f"[{address.exploded}]",
            f"[{str(address).upper()}]",
            f"[{address}%25lo]",
            f"[{address}].",
            f"[{address}]@agent.example",
            f"agent.example[{address}]",
            f"[{address}][2606:4700::1111]",
            f"[2606:4700::1111][{address}]",
            str(address),
            f"{number:x}.ip6.arpa.",
        ]
    parts = str(address).split(".")
    return [
        str(address),
        str(number),
        hex(number),
        f"0{number:o}",
        ".".join(hex(int(part)) for part in parts),
        ".".join(f"0{int(part):o}" for part in parts),
        f"{parts[0]}.{number & 0xFFFFFF}",
        f"{parts[0]}.{parts[1]}.{number & 0xFFFF}",
        f"{address}.",
        f"[::ffff:{address}]",
        f"[::ffff:{number >> 16:x}:{number & 0xFFFF:x}]",
        f"[::ffff:{address}%25lo]",
        f"[::{address}]",
        f"[64:ff9b::{address}]",
        f"[64:ff9b:1::{address}]",
        f"[2002:{number >> 16:x}:{number & 0xFFFF:x}::1]",
        f"[2001:0:4136:e378:8000:63bf:{~number >> 16 & 0xFFFF:x}:{~number & 0xFFFF:x}]",
        f"[{address}]",
        f"{address}:443",
        f"{address}%00.example.com",
        f"{address}%2f.example.com",
        f"{address} .example.com",
        f"\t{address}",
        f"{address}\u3002",
        f"{address}?.example.com",
        f"{address}/.example.com",
        f"{parts[0]}.{parts[1]}.{parts[2]}.{int(parts[3]):#x}",
        f"{parts[0]}.{parts[1]}.{parts[2]}.{int(parts[3]):03o}",
        ".".join(f"{int(part):03d}" for part in parts),
        "".join(chr(0x245F + int(char)) if char in "123456789" else char for char in str(address)),
        str(address).replace(".", "\uff0e"),
        str(address).replace(".", "\uff61"),
        str(address).replace(".", "%2e"),
        f"xn--{address}",
        f"agent.example:443@{address}",
        f"{address}\u00ad",
        str(address).replace(".", "\u3002"),
        "".join(chr(ord(digit) + 0xFEE0) if digit.isdigit() else digit for digit in str(address)),
        f"agent.example@{address}",
        f"{address}#.example.com",
        f"{address}\\.example.com",
        f"%31{str(address)[1:]}",
    ]


class Wherever:
    """Every name leads to one public address, and to one that is refused."""

    def __init__(self, refused: Address) -> None:
        self._refused = refused

    async def __call__(self, host: str, org_id: str) -> Sequence[Address]:
        return [IPv4Address("93.184.215.14"), self._refused]


class Connections:
    """Whatever in this process connects to an address of the internet, whoever does it, is told by the interpreter."""

    def __init__(self) -> None:
        self.opened: list[object] = []
        self.watching = False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.watching and event == "socket.connect" and isinstance(arguments[1], tuple):
            self.opened.append(arguments[1])


CONNECTIONS = Connections()


@pytest.fixture(scope="module")
def quiet() -> Iterator[None]:
    """Each refusal is logged."""
    logger = logging.getLogger("external_agents.adapters.webhook")
    logger.disabled = True
    yield
    logger.disabled = False


@settings(max_examples=40, deadline=None)
@pytest.mark.usefixtures("quiet")
@given(refused=PLAIN.filter(lambda address: not model(address)), scheme=st.sampled_from(["https", "http"]))
async def test_what_the_model_refuses_is_refused_however_it_is_spelt(refused: Address, scheme: str) -> None:
    """Some thousand spellings: as an address, as something that a resolver would take for it, as a name for it."""
    async with open_transport("192.0.2.255/32", resolve=Wherever(refused)) as transport:
        if refused == IPv4Address("192.0.2.255"):
            return
        CONNECTIONS.opened.clear()
        CONNECTIONS.watching = True
        try:
            hosts = [*spellings(refused), "agent.example", "agent", "localhost", "b\u00fccher.example"]
            urls = [f"{scheme}://{host}{port}/" for host in hosts for port in ("", ":8443")]
            requests = [request_to(url, timeout_s=10) for url in urls]
            requests += [request_to("https://agent.example/", credentials=client_of(url)) for url in urls]
            outcomes = await asyncio.gather(*map(transport.exchange, requests))
        finally:
            CONNECTIONS.watching = False
        reached = [
            request.url
            for request, outcome in zip(requests, outcomes, strict=True)
            if outcome.error is not ErrorCode.EGRESS_REFUSED
        ]
        assert reached == []
        assert CONNECTIONS.opened == []


LOOPBACK = st.sampled_from(["127.0.0.1", "127.0.0.2", "127.1.2.3", "::1", "0.0.0.0", "::"]).map(ip_address)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    refused=LOOPBACK,
    others=st.lists(st.just("93.184.215.14"), max_size=3),
    place=st.integers(0, 3),
    scheme=st.sampled_from(["http", "https"]),
)
async def test_no_spelling_opens_a_connection(refused: Address, others: list[str], place: int, scheme: str) -> None:
    """Literally in every spelling, and as one of the addresses of a name; the canary listens on this machine."""
    addresses = [*others[:place], str(refused), *others[place:]]
    async with serve_agent() as canary:
        for allow in ("", "10.0.0.0/8"):
            names = Names(agent_example=[addresses])
            async with open_transport(allow, ports=str(canary.port), resolve=names) as transport:
                urls = [f"{scheme}://{host}:{canary.port}/" for host in (*spellings(refused), "agent.example")]
                outcomes = await asyncio.gather(*(transport.exchange(request_to(url, timeout_s=10)) for url in urls))
                assert {outcome.error for outcome in outcomes} <= {
                    ErrorCode.EGRESS_REFUSED,
                    ErrorCode.CONNECTION_FAILED,
                }
                assert outcomes[-1].error is ErrorCode.EGRESS_REFUSED
        assert canary.connections == 0


def test_the_model_and_the_policy_agree_about_an_operators_own() -> None:
    policy = EgressPolicy.parse("loopback,private")
    for text in ("127.0.0.1", "::1", "10.0.0.1", "172.31.255.255", "192.168.0.1", "fd00::1", "::ffff:10.0.0.1"):
        assert policy.allows(ip_address(text))
        assert not model(ip_address(text))
