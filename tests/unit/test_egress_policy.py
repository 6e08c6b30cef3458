"""The edges of every range of addresses that is not public, as the registries give them."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest

from external_agents.domain.egress import Destination, EgressPolicy, is_public

CLOSED_V4 = (
    "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 168.63.129.16/32 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24"
    " 192.0.2.0/24 192.31.196.0/24 192.52.193.0/24 192.88.99.0/24 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15"
    " 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4"
).split()
CLOSED_V6 = "2001::/23 2001:db8::/32 2002::/16 2620:4f:8000::/48 3fff::/20 ::/3 4000::/2 8000::/1".split()
NEIGHBOURS_CLOSED = {"224.0.0.0/4", "240.0.0.0/4", "0.0.0.0/8", "3fff::/20", "::/3", "4000::/2", "8000::/1"}

HTTPS = Destination("https", "agent.example", 443)
PUBLIC = EgressPolicy()


@pytest.mark.parametrize("cidr", CLOSED_V4 + CLOSED_V6)
def test_a_range_is_closed_from_edge_to_edge(cidr: str) -> None:
    network = ip_network(cidr)
    for address in (network[0], network[-1], network[network.num_addresses // 2]):
        assert not is_public(address)
        assert not PUBLIC.permits(HTTPS, address)


@pytest.mark.parametrize("cidr", [cidr for cidr in CLOSED_V4 + CLOSED_V6 if cidr not in NEIGHBOURS_CLOSED])
def test_and_not_beyond(cidr: str) -> None:
    network = ip_network(cidr)
    beside = [int(network[0]) - 1, int(network[-1]) + 1]
    make = IPv4Address if network.version == 4 else IPv6Address
    assert any(is_public(make(number)) for number in beside)


@pytest.mark.parametrize("carrier", ["::ffff:0:0", "64:ff9b::"])
@pytest.mark.parametrize(("carried", "public"), [("10.0.0.1", False), ("127.0.0.1", False), ("8.8.8.8", True)])
def test_an_address_that_carries_another_is_judged_by_it(carrier: str, carried: str, public: bool) -> None:
    dressed = IPv6Address(int(IPv6Address(carrier)) | int(IPv4Address(carried)))
    assert is_public(dressed) == public


@pytest.mark.parametrize("text", ["2606:4700::1%eth0", "fe80::1%1"])
def test_an_address_with_a_zone_is_never_public(text: str) -> None:
    assert not is_public(ip_address(text))


@pytest.mark.parametrize(
    ("destination", "permitted"),
    [
        (HTTPS, True),
        (Destination("https", "agent.example", 8443), True),
        (Destination("https", "agent.example", 444), False),
        (Destination("http", "agent.example", 443), False),
        (Destination("https", "agent", 443), False),
        (Destination("https", "agent.internal", 443), False),
    ],
)
def test_a_public_address_by_https_on_the_ports_by_a_public_name(destination: Destination, permitted: bool) -> None:
    assert PUBLIC.permits(destination, ip_address("93.184.215.14")) == permitted
    opened = EgressPolicy.parse("93.184.215.14")
    assert opened.permits(destination, ip_address("93.184.215.14"))
