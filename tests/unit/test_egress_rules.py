"""Where requests may go: the shape of a URL at registration, the address at every call."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from external_agents import ConfigurationError, EgressPolicy
from external_agents.domain.egress import Destination, is_public

PUBLIC = EgressPolicy()
LOCAL = EgressPolicy.parse("loopback")
BOTH = EgressPolicy.parse("loopback, private,169.254.7.0/24", "443")


class TestUrls:
    @pytest.mark.parametrize(
        "url",
        [
            "https://example.com",
            "https://EXAMPLE.com:8443/a%20b?c=d&e",
            "https://xn--bcher-kva.example/",
            "https://bücher.example/",
            "https://a_b.example.com/",
            "https://8.8.8.8/",
            "https://[2606:4700::1111]:443/",
            "https://example.com:65535/",
        ],
    )
    def test_what_may_be_registered(self, url: str) -> None:
        assert PUBLIC.url_faults(url) == []

    @pytest.mark.parametrize(
        "url",
        [
            "",
            "example.com",
            "//example.com",
            "http://example.com",
            "HTTP://example.com",
            "ftp://example.com",
            "javascript:alert(1)",
            "https://",
            "https:///path",
            "https://user@example.com/",
            "https://user:pass@example.com/",
            "https://@example.com/",
            "https://example.com/#fragment",
            "https://example.com/#",
            "https://example.com:0/",
            "https://example.com:65536/",
            "https://example.com:x/",
            "https://exa mple.com/",
            "https://example.com/a b",
            "https://example.com\\@evil.example/",
            "https://example.com/\x00",
            "https://example.com/\n",
            "https://example.com./",
            "https://.example.com/",
            "https://exa..mple.com/",
            "https://-example.com/",
            "https://%65xample.com/",
            "https://example.com%00.evil.example/",
            "https://" + "a" * 64 + ".com/",
            "https://" + "a." * 127 + "com/",
            "https://example.com/" + "x" * 1981,
            "https://single/",
            "https://localhost/",
            "https://LOCALHOST/",
            "https://a.localhost/",
            "https://a.local/",
            "https://a.internal/",
            "https://db.default.svc/",
            "https://127.0.0.1/",
            "https://127.1/",
            "https://2130706433/",
            "https://0x7f.0.0.1/",
            "https://0177.0.0.1/",
            "https://1.2.3/",
            "https://10.0.0.1/",
            "https://169.254.169.254/latest/meta-data",
            "https://100.64.0.1/",
            "https://0.0.0.0/",
            "https://224.0.0.1/",
            "https://255.255.255.255/",
            "https://8.8.8.8:8080/",
            "https://[::1]/",
            "https://[::]/",
            "https://[::ffff:127.0.0.1]/",
            "https://[::ffff:a00:1]/",
            "https://[64:ff9b::7f00:1]/",
            "https://[fe80::1]/",
            "https://[fe80::1%25eth0]/",
            "https://[fc00::1]/",
            "https://[2001:db8::1]/",
            "https://[2002:7f00:1::]/",
            "https://[::127.0.0.1]/",
            "https://[zzz]/",
            "https://[::1/",
            "https://\uff11\uff12\uff17.0.0.1/",
            "https://[8.8.8.8]/",
            "https://[example.com]/",
            "https://[2606:4700::1111]x/",
            "https://x[2606:4700::1111]/",
            "https://8.8.8.8[2606:4700::1111]/",
            "https://[2606:4700::1111][::1]/",
            "https://[v1.x]/",
            "https://[::ffff:8.8.8.8%251]/",
            "https://[64:ff9b::8.8.8.8%25lo]/",
            "https://[64:ff9b:1::808:808]/",
            "https://[2001:0:808:808::1]/",
            "https://[2606:4700::1111%2525]/",
            "https://example.com:\u0664\u0664\u0663/",
            "https://example.com:+443/",
            "https://example.com:4_43/",
            "https://example.com:443:443/",
            "https://1.2.3.4.5/",
            "https://example.0x1f/",
            "https://example.0X/",
            "https://example.com.0/",
            "https://example\uff0ecom\uff0e/",
            "https://example.com/\u1680",
            "https://example.com/\u205f",
            "https://example.com/\ufeff",
            "https://exa\u00admple.com/",
            "https://example.com/\t",
            "https://example.com/\x7f",
            "https://example.com/\x85",
            " https://example.com/",
            "https://example.com/ ",
            "https:\\\\example.com/",
            "https://\u24dbocalhost/",
        ],
    )  # fmt: skip
    def test_what_may_not(self, url: str) -> None:
        faults = PUBLIC.url_faults(url)
        assert faults
        assert all("\0" not in fault for fault in faults)

    @pytest.mark.parametrize(
        "url",
        [
            "http://127.0.0.1:8001/",
            "https://127.0.0.2/",
            "http://localhost:5000/",
            "http://[::1]:80/",
            "http://agent:9000/",
            "http://agent.internal/",
            "http://example.com/",
            "https://8.8.8.8/",
        ],
    )
    def test_what_an_operator_opens(self, url: str) -> None:
        assert LOCAL.url_faults(url) == []

    @pytest.mark.parametrize("url", ["http://10.0.0.1/", "http://8.8.8.8/", "https://8.8.8.8:8080/", "http://u@a.b/"])
    def test_what_stays_closed_all_the_same(self, url: str) -> None:
        assert LOCAL.url_faults(url)


class TestAddresses:
    @pytest.mark.parametrize(
        ("policy", "url", "address", "permitted"),
        [
            (PUBLIC, "https://example.com/", "93.184.215.14", True),
            (PUBLIC, "https://example.com:8443/", "93.184.215.14", True),
            (PUBLIC, "https://example.com:8444/", "93.184.215.14", False),
            (PUBLIC, "https://example.com/", "2606:4700::1111", True),
            (PUBLIC, "https://example.com/", "127.0.0.1", False),
            (PUBLIC, "https://example.com/", "::ffff:127.0.0.1", False),
            (PUBLIC, "https://example.com/", "10.1.2.3", False),
            (PUBLIC, "https://example.com/", "169.254.169.254", False),
            (PUBLIC, "https://example.com/", "fd00::1", False),
            (LOCAL, "https://example.com/", "127.0.0.1", True),
            (LOCAL, "http://example.com/", "93.184.215.14", False),
            (LOCAL, "http://single/", "127.0.0.1", True),
            (LOCAL, "https://single/", "93.184.215.14", False),
            (LOCAL, "https://a.internal/", "93.184.215.14", False),
            (LOCAL, "http://10.0.0.1/", "10.0.0.1", False),
            (BOTH, "http://10.0.0.1:81/", "10.0.0.1", True),
            (BOTH, "http://10.0.0.1:81/", "::ffff:10.0.0.1", True),
            (BOTH, "http://metadata/", "169.254.7.9", True),
            (BOTH, "http://metadata/", "169.254.169.254", False),
            (BOTH, "https://example.com:8443/", "93.184.215.14", False),
        ],
    )
    def test_what_a_connection_may_be_opened_to(
        self, policy: EgressPolicy, url: str, address: str, permitted: bool
    ) -> None:
        assert policy.permits(Destination.of(url), ip_address(address)) is permitted

    def test_localhost_is_what_is_allowed_of_it(self) -> None:
        assert PUBLIC.localhost() == ()
        assert [str(address) for address in LOCAL.localhost()] == ["127.0.0.1", "::1"]
        assert [str(address) for address in EgressPolicy.parse("127.0.0.0/8").localhost()] == ["127.0.0.1"]

    @pytest.mark.parametrize("text", ["2606:4700::1111%1", "::ffff:8.8.8.8%1", "64:ff9b::808:808%lo"])
    def test_an_address_with_a_zone_is_not_public(self, text: str) -> None:
        assert not is_public(ip_address(text))

    @pytest.mark.parametrize("text", ["::1%1", "::ffff:127.0.0.1%lo"])
    def test_an_address_with_a_zone_is_not_an_operators_own(self, text: str) -> None:
        assert not LOCAL.allows(ip_address(text))


class TestSettings:
    def test_words_and_networks(self) -> None:
        assert [str(network) for network in BOTH.allow][:2] == ["127.0.0.0/8", "::1/128"]
        assert EgressPolicy.parse("", "8443, 443") == PUBLIC == EgressPolicy.parse(" , ")

    @pytest.mark.parametrize(
        ("allow", "ports"),
        [("everything", ""), ("10.0.0.1/8", ""), ("10.0.0.0/33", ""), ("", "0"), ("", "65536"), ("", "x")],
    )
    def test_what_is_neither(self, allow: str, ports: str) -> None:
        with pytest.raises(ConfigurationError):
            EgressPolicy.parse(allow, ports)


def test_origins() -> None:
    same = {Destination.of(url).origin for url in ("https://A.example/x", "https://a.example:443", "https://a.EXAMPLE")}
    assert same == {"https://a.example:443"}
    assert Destination.of("http://a.example/").origin != Destination.of("https://a.example/").origin
