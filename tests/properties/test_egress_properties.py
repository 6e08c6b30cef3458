"""No URL breaks the judge, and what it lets through leads nowhere private."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from hypothesis import given, settings
from hypothesis import strategies as st

from external_agents.domain.egress import Destination, EgressPolicy, is_public
from external_agents.testing.strategies import public_urls

PUBLIC = EgressPolicy()
LOCAL = EgressPolicy.parse("loopback")
URLS = (
    st.text(max_size=30).map(lambda text: f"https://{text}")
    | st.text("htps:/@#?[]%.0123456789abxfABF:\\-_\u00fc\u3002\u24db", max_size=40)
    | st.from_regex(r"https?://[^/]{0,20}(:[0-9]{0,6})?(/.{0,5})?", fullmatch=True)
    | public_urls()
)


@settings(max_examples=400)
@given(URLS)
def test_no_url_breaks_the_judge(url: str) -> None:
    for policy in (PUBLIC, LOCAL):
        faults = policy.url_faults(url)
        if not faults:
            destination = Destination.of(url)
            assert destination.host
            assert 1 <= destination.port <= 65535
            assert Destination.of(destination.origin) == destination or ":" in destination.host
    if not PUBLIC.url_faults(url):
        assert Destination.of(url).scheme == "https"


@given(public_urls())
def test_public_names_may_be_registered(url: str) -> None:
    assert PUBLIC.url_faults(url) == []


@given(st.ip_addresses(v=4) | st.ip_addresses(v=6) | st.integers(0, 2**32 - 1).map(IPv4Address))
def test_what_is_public_is_global_to_the_standard_library_too(address: IPv4Address | IPv6Address) -> None:
    if is_public(address):
        carried = getattr(address, "ipv4_mapped", None) or address
        assert carried.is_global or address in _NAT64
        assert not carried.is_multicast


_NAT64 = ip_network("64:ff9b::/96")


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_judged_alike_in_every_dress(address: IPv4Address) -> None:
    for dressed in (IPv6Address(f"::ffff:{address}"), IPv6Address(int(ip_address("64:ff9b::")) | int(address))):
        assert is_public(dressed) == is_public(address)
        assert LOCAL.allows(dressed) == LOCAL.allows(address)
