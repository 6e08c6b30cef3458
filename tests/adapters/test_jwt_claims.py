"""What a token that is properly signed stands for, and for how long."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_agents.adapters.identity import ByForm
from external_agents.adapters.identity.jwt import IssuerKeys, JwtAuthenticator, KeySet
from external_agents.adapters.identity.jwt.authenticator import PROOFS_MAX, PROVED_S, TOKEN_LENGTH_MAX
from external_agents.adapters.identity.jwt.claims import NO_ATTRIBUTES
from external_agents.adapters.memory import MemoryAuthenticator
from external_agents.domain.access import Principal
from external_agents.testing.fakes import FakeClock
from token_issuer import AUDIENCE, ISSUER, NOW, SigningKey, TokenIssuer, passes

words = st.sampled_from(
    ["", "ES256", "EdDSA", "none", "key-1", "JWT", "alice", AUDIENCE, ISSUER, "read:external_agent"]
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | words, inner, max_size=3),
    max_leaves=4,
)


async def test_the_claims_make_the_principal(issuer: TokenIssuer, door: JwtAuthenticator) -> None:
    token = issuer.token(
        jti="a1",
        nbf=NOW - 5,
        iat=NOW - 5,
        team="ops",
        empty="",
        email="alice@example.com",
        scope="openid profile",
        azp="console",
        admin=True,
        level=3,
        ratio=0.5,
        groups=["a", "b"],
        address={"street": "x"},
        nickname=None,
        permissions=["read:external_agent", "read:external_agent", "billing:write"],
    )
    assert await door.authenticate(token) == Principal(
        "acme",
        "alice",
        {"read:external_agent", "billing:write"},
        {"team": "ops", "empty": "", "email": "alice@example.com", "scope": "openid profile", "azp": "console"},
    )


@pytest.mark.parametrize("permissions", [None, []])
async def test_without_permissions_none_are_held(
    issuer: TokenIssuer, door: JwtAuthenticator, permissions: list[str] | None
) -> None:
    assert (await door.authenticate(issuer.token(permissions=permissions))).permissions == frozenset()


@pytest.mark.parametrize("audience", [AUDIENCE, [AUDIENCE], ["billing", AUDIENCE]])
async def test_one_audience_of_several_is_enough(issuer: TokenIssuer, door: JwtAuthenticator, audience: Any) -> None:
    assert await passes(door, issuer.token(aud=audience))


@pytest.mark.parametrize(
    ("claims", "is_valid"),
    [
        ({"exp": NOW - 59}, True),
        ({"exp": NOW - 59.999}, True),
        ({"exp": NOW - 60}, False),
        ({"exp": 0}, False),
        ({"exp": -(10**300)}, False),
        ({"exp": 10**300}, True),
        ({"exp": 1.8e9}, True),
        ({"nbf": NOW + 60}, True),
        ({"nbf": NOW + 60.001}, False),
        ({"nbf": 10**300}, False),
        ({"iat": NOW + 60}, True),
        ({"iat": NOW + 61}, False),
        ({"iat": "yesterday"}, False),
        ({"nbf": True}, False),
    ],
    ids=str,
)
async def test_clocks_may_be_a_minute_apart(
    issuer: TokenIssuer, door: JwtAuthenticator, claims: dict[str, Any], is_valid: bool
) -> None:
    assert await passes(door, issuer.token(**claims)) is is_valid


async def test_a_token_expires_although_it_is_remembered(
    issuer: TokenIssuer, door: JwtAuthenticator, clock: FakeClock
) -> None:
    token = issuer.token(exp=NOW - 30)
    assert await passes(door, token)
    clock.advance(29.9)
    assert await passes(door, token)
    clock.advance(0.1)
    assert not await passes(door, token)


async def test_a_token_is_remembered_for_a_minute(
    issuer: TokenIssuer, door: JwtAuthenticator, clock: FakeClock
) -> None:
    token = issuer.token()
    first = await door.authenticate(token)
    clock.advance(PROVED_S - 0.1)
    assert await door.authenticate(token) is first
    clock.advance(0.1)
    again = await door.authenticate(token)
    assert again == first
    assert again is not first


async def test_what_is_remembered_is_bounded(issuer: TokenIssuer, door: JwtAuthenticator) -> None:
    token = issuer.token()
    first = await door.authenticate(token)
    for number in range(PROOFS_MAX - 1):
        await door.authenticate(issuer.token(sub=f"subject-{number}"))
    assert await door.authenticate(token) is first
    await door.authenticate(issuer.token(sub="one more"))
    assert await door.authenticate(token) is not first


async def test_the_longest_token(issuer: TokenIssuer, door: JwtAuthenticator) -> None:
    room = TOKEN_LENGTH_MAX - len(issuer.token(filling=""))
    assert await passes(door, issuer.token(filling="x" * (room * 3 // 4 - 1)))
    assert not await passes(door, issuer.token(filling="x" * (room * 3 // 4 + 4)))


@given(
    header=st.dictionaries(
        st.sampled_from(["alg", "kid", "typ", "cty", "x5t", "nonce", "b64", "crit"]), anything, max_size=3
    ),
    claims=st.dictionaries(st.sampled_from([*sorted(NO_ATTRIBUTES), "team"]), anything, max_size=3),
)
async def test_whatever_is_signed_is_a_principal_or_refused(header: dict[str, Any], claims: dict[str, Any]) -> None:
    key = SigningKey()

    async def fetch() -> KeySet:
        return KeySet.parse(json.dumps({"keys": [key.jwk]}).encode())

    clock = FakeClock()
    door = JwtAuthenticator(issuer=ISSUER, audience=AUDIENCE, keys=IssuerKeys(fetch, clock), clock=clock)
    good = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "org_id": "acme", "exp": NOW + 300}
    assert await passes(door, key.token({**good, **claims}, **header)) or header or claims


async def test_credentials_go_where_they_belong_by_their_form(issuer: TokenIssuer, door: JwtAuthenticator) -> None:
    api_keys = MemoryAuthenticator()
    both = ByForm(api_keys=api_keys, jwt=door)
    service = Principal("acme", "service", ())
    assert await both.authenticate(api_keys.issue(service)) == service
    assert (await both.authenticate(issuer.token())).subject == "alice"
    for neither in ("", "a.b", "a.b.c", "a.b.c.d.e", issuer.token() + ".x"):
        assert not await passes(both, neither)
    assert not await passes(api_keys, issuer.token())
