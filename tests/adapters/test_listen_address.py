"""Where METRICS_ADDRESS says to listen."""

from __future__ import annotations

import pytest

from external_agents.domain.errors import ConfigurationError
from external_agents.settings import ListenAddress, Settings

VARIABLE = "EXTERNAL_AGENTS_METRICS_ADDRESS"


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:9100", "127.0.0.1", 9100),
        ("localhost:0", "localhost", 0),
        ("metrics-1.internal:65535", "metrics-1.internal", 65535),
        ("[::1]:9100", "::1", 9100),
        ("[::ffff:127.0.0.1]:1", "::ffff:127.0.0.1", 1),
    ],
)
def test_addresses(text: str, host: str, port: int) -> None:
    address = Settings.from_env({VARIABLE: text}).metrics_address
    assert address == ListenAddress(host, port)
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "9100",
        ":9100",
        "localhost",
        "localhost:",
        "localhost:65536",
        "localhost:-1",
        "localhost:http",
        "localhost:٣",
        "::1:9100",
        "[::1]",
        "[localhost]:9100",
        "[1.2.3.4]:9100",
        "[::g]:9100",
        "http://localhost:9100",
        "localhost:9100/metrics",
        "local host:9100",
        "localhost:9100\n",
    ],
)
def test_what_is_none_is_named(text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{VARIABLE} must "):
        Settings.from_env({VARIABLE: text})


def test_without_it_there_is_none() -> None:
    assert Settings.from_env({}).metrics_address is None
    assert Settings.from_env({VARIABLE: ""}).metrics_address is None
