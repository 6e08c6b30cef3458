"""Hypothesis strategies: what a caller may send. Needs hypothesis."""

from __future__ import annotations

import base64
import string
from decimal import Decimal
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from external_agents.domain.http_fields import tenant_may_set
from external_agents.domain.json_values import JsonValue
from external_agents.domain.signing import KEY_BYTES_MAX, KEY_BYTES_MIN, PREFIX

_TOKEN_CHARACTERS = string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~"
_VISIBLE = "".join(map(chr, range(0x21, 0x7F)))


def texts(min_size: int = 0, max_size: int = 40) -> SearchStrategy[str]:
    """Whatever PostgreSQL's text holds: no NUL, no lone surrogates."""
    return st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=min_size, max_size=max_size
    )


def decimals() -> SearchStrategy[Decimal]:
    """Exact numbers within a double's range."""
    return st.decimals(min_value=-(10**30), max_value=10**30, places=20, allow_nan=False)


def field_values(max_leaves: int = 12) -> SearchStrategy[JsonValue]:
    """Values of the fields of an agent: JSON that jsonb holds."""
    scalars = st.none() | st.booleans() | st.integers(-(2**200), 2**200) | decimals() | texts()
    return st.recursive(
        scalars,
        lambda values: st.lists(values, max_size=4) | st.dictionaries(texts(max_size=10), values, max_size=4),
        max_leaves=max_leaves,
    )


def payloads(max_leaves: int = 20) -> SearchStrategy[JsonValue]:
    """Any JSON value as Python holds it: NUL and lone surrogates in strings, large integers, floats."""
    scalars = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters())
    )
    return st.recursive(
        scalars,
        lambda values: st.lists(values, max_size=5) | st.dictionaries(st.text(st.characters()), values, max_size=5),
        max_leaves=max_leaves,
    )


@st.composite
def public_urls(draw: st.DrawFn) -> str:
    """https URLs of public names."""
    label = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
    labels = draw(st.lists(label, min_size=1, max_size=3))
    port = draw(st.sampled_from(["", ":443", ":8443"]))
    path = draw(st.from_regex(r"(/[A-Za-z0-9._~%-]{0,8}){0,3}(\?[A-Za-z0-9=&]{0,8})?", fullmatch=True))
    return f"https://{'.'.join(labels)}.com{port}{path}"


def header_names() -> SearchStrategy[str]:
    """Names that a tenant may set."""
    return st.text(_TOKEN_CHARACTERS, min_size=1, max_size=30).filter(tenant_may_set)


def header_values() -> SearchStrategy[str]:
    """Visible ASCII, spaces within."""
    return st.builds(
        lambda first, middle, last: first + middle + last,
        st.sampled_from(_VISIBLE),
        st.text(_VISIBLE + " ", max_size=20),
        st.sampled_from(_VISIBLE),
    )


def _printable() -> SearchStrategy[str]:
    return texts(1, 20).filter(str.isprintable)


AUTH_CONFIGS: dict[str, SearchStrategy[dict[str, Any]]] = {
    "oauth2": st.fixed_dictionaries(
        {"client_id": texts(1), "client_secret": texts(1), "token_url": public_urls()},
        optional={"scope": texts(1), "audience": texts(1)},
    ),
    "api_key": st.fixed_dictionaries({"key": header_values(), "header_name": header_names()}),
    "bearer": st.fixed_dictionaries({"token": header_values()}),
    "basic": st.fixed_dictionaries(
        {"username": _printable().filter(lambda text: ":" not in text), "password": _printable()}
    ),
    "custom": st.dictionaries(texts(max_size=10).filter(lambda name: name != "headers"), field_values(), max_size=3)
    | st.fixed_dictionaries({"headers": st.dictionaries(header_names(), header_values(), max_size=3)}),
    "none": st.just({}),
}
"""Valid auth_configs by auth_type, secrets included."""

PLATFORM_CONFIGS: dict[str, SearchStrategy[dict[str, Any]]] = {
    "teams": st.fixed_dictionaries(
        {"tenant_id": texts(1), "channel_id": texts(1)}, optional={"webhook_url": public_urls()}
    ),
    "discord": st.fixed_dictionaries(
        {"webhook_url": public_urls(), "username": texts(1)}, optional={"avatar_url": public_urls()}
    ),
    "slack": st.fixed_dictionaries({"webhook_url": public_urls(), "channel": texts(1)}),
    "telegram": st.fixed_dictionaries({"bot_token": texts(1), "chat_id": texts(1) | st.integers(-(2**63), 2**63 - 1)}),
    "notion": st.fixed_dictionaries({"token": texts(1), "database_id": texts(1)}),
    "custom": st.dictionaries(texts(max_size=10), field_values(), max_size=3),
}
"""Valid platform_configs by provider, secrets included."""


def amounts() -> SearchStrategy[Decimal]:
    """Amounts of money within their bounds, with at most 9 decimals."""
    return st.integers(0, 10**21 - 1).map(lambda billionths: Decimal(billionths).scaleb(-9))


def money_values() -> SearchStrategy[JsonValue]:
    """What a budget_config or an agent's answer may give for an amount."""
    return amounts() | amounts().map(lambda amount: f"{amount:f}") | st.integers(0, 10**12 - 1)


def rate_limit_configs() -> SearchStrategy[dict[str, Any]]:
    limit = st.integers(0, 1_000_000_000)
    return st.fixed_dictionaries({}, optional={f"requests_per_{window}": limit for window in ("minute", "hour", "day")})


def budget_configs() -> SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {},
        optional={
            "max_cost_per_invocation": money_values(),
            "max_monthly_cost": money_values(),
            "currency": st.text(string.ascii_uppercase, min_size=3, max_size=3),
        },
    )


def signing_secrets() -> SearchStrategy[str]:
    return st.binary(min_size=KEY_BYTES_MIN, max_size=KEY_BYTES_MAX).map(
        lambda key: PREFIX + base64.b64encode(key).decode("ascii")
    )


@st.composite
def agent_documents(draw: st.DrawFn) -> dict[str, Any]:
    """Whole agents as their owners describe them, of every provider and auth type, secrets included."""
    auth_type = draw(st.sampled_from(sorted(AUTH_CONFIGS)))
    provider = draw(st.sampled_from(sorted(PLATFORM_CONFIGS)))
    document: dict[str, Any] = {
        "name": draw(texts(1)),
        "provider": provider,
        "webhook_url": draw(public_urls()),
        "auth_type": auth_type,
    }
    if auth_type != "none" or draw(st.booleans()):
        document["auth_config"] = draw(AUTH_CONFIGS[auth_type])
    if provider != "custom" or draw(st.booleans()):
        document["platform_config"] = draw(PLATFORM_CONFIGS[provider])
    return document | draw(
        st.fixed_dictionaries(
            {},
            optional={
                "description": texts(),
                "rate_limit_config": st.none() | rate_limit_configs(),
                "budget_config": st.none() | budget_configs(),
                "tags": st.lists(texts(1, 10), max_size=5),
                "timeout_s": st.integers(1, 30) | st.decimals(1, 30, places=3),
                "max_attempts": st.integers(1, 3),
                "signing_secret": st.none() | signing_secrets(),
                "status": st.sampled_from(["active", "inactive"]),
            },
        )
    )
