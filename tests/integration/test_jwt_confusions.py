"""Tokens that have opened doors elsewhere: each is signed or made up as well as can be, and each gets 401."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias

import httpx
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from joserfc import jwe, jwk

from agents import Reply, serve_agent
from external_agents.adapters.identity.jwt.authenticator import TOKEN_LENGTH_MAX
from external_agents.adapters.memory import memory_service
from external_agents.adapters.rest import create_app
from external_agents.testing.fakes import FakeClock, ScriptedTransport
from rest_api import AGENTS, is_problem
from token_issuer import AUDIENCE, ISSUER, SigningKey, TokenIssuer, b64, door_of, part, serve_issuer

CANARY = "canary-5d21c7"

Make: TypeAlias = Callable[[TokenIssuer], str]


@pytest.fixture
async def issuer() -> AsyncIterator[TokenIssuer]:
    async with serve_issuer() as issuer:
        issuer.key = SigningKey("RS256")
        issuer.published = [issuer.key.jwk]
        yield issuer


@pytest.fixture
async def api(issuer: TokenIssuer) -> AsyncIterator[httpx.AsyncClient]:
    async with door_of(issuer, FakeClock()) as door:
        app = create_app(memory_service(ScriptedTransport()), authenticator=door)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api.test") as client:
            yield client


async def call(api: httpx.AsyncClient, token: str) -> httpx.Response:
    return await api.get(AGENTS, headers={"Authorization": f"Bearer {token}"})


def replaced(token: str, index: int, text: str) -> str:
    parts = token.split(".")
    parts[index] = text
    return ".".join(parts)


def public(issuer: TokenIssuer, encoding: Encoding, form: PublicFormat) -> bytes:
    return bytes(issuer.key.private.public_key().public_bytes(encoding, form))


def with_hmac(issuer: TokenIssuer, secret: bytes) -> str:
    signed = f"{part({'alg': 'HS256', 'typ': 'JWT', 'kid': 'key-1'})}.{part(issuer.claims())}"
    return f"{signed}.{b64(hmac.digest(secret, signed.encode(), hashlib.sha256))}"


def with_padding(issuer: TokenIssuer, algorithm: str, pad: Any, digest: Any) -> str:
    signed = f"{part({'alg': algorithm, 'kid': 'key-1'})}.{part(issuer.claims())}"
    return f"{signed}.{b64(issuer.key.private.sign(signed.encode(), pad, digest))}"


def nested(levels: int) -> Any:
    return json.loads("[" * levels + "]" * levels) if levels < 500 else None


def raw(issuer: TokenIssuer, payload: bytes) -> str:
    return issuer.key.token(payload)


def doubled(issuer: TokenIssuer, member: str, value: Any) -> bytes:
    """The claims, one of them twice; readers differ in which they take."""
    return json.dumps(issuer.claims()).replace("{", f'{{"{member}": {json.dumps(value)}, ', 1).encode()


def encrypted(issuer: TokenIssuer) -> str:
    key: Any = jwk.import_key({name: value for name, value in issuer.key.jwk.items() if name in {"kty", "n", "e"}})
    header = {"alg": "RSA-OAEP-256", "enc": "A256GCM", "kid": "key-1"}
    return jwe.encrypt_compact(header, json.dumps(issuer.claims()), key, algorithms=["RSA-OAEP-256", "A256GCM"])


def of_stranger(issuer: TokenIssuer, **header: Any) -> str:
    """Signed by a key of the attacker's, which bears the right name unless it is told otherwise."""
    stranger = SigningKey("ES256")
    given = {name: value(stranger) if callable(value) else value for name, value in header.items()}
    return stranger.token(issuer.claims(), **given)


def in_two_keys(issuer: TokenIssuer, **header: Any) -> str:
    issuer.published.append(SigningKey("ES256", "key-2").jwk)
    return issuer.token(header=header)


def in_der(issuer: TokenIssuer) -> str:
    issuer.rotate()
    token = issuer.token()
    return replaced(
        token, 2, b64(issuer.key.private.sign(token.rpartition(".")[0].encode(), ec.ECDSA(hashes.SHA256())))
    )


def of_zeros(issuer: TokenIssuer) -> str:
    issuer.rotate()
    return replaced(issuer.token(), 2, b64(bytes(64)))


FORGED: dict[str, Make] = {
    "none": lambda i: f"{part({'alg': 'none', 'kid': 'key-1'})}.{part(i.claims())}.",
    "nOnE": lambda i: f"{part({'alg': 'nOnE', 'kid': 'key-1'})}.{part(i.claims())}.",
    "none, signed": lambda i: i.token(header={"alg": "none"}),
    "no algorithm": lambda i: i.token(header={"alg": None}),
    "an algorithm that is a list": lambda i: i.token(header={"alg": ["RS256"]}),
    "HMAC with the public key in PEM": lambda i: with_hmac(
        i, public(i, Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    ),
    "HMAC with the public key in PKCS 1": lambda i: with_hmac(i, public(i, Encoding.PEM, PublicFormat.PKCS1)),
    "HMAC with the public key in DER": lambda i: with_hmac(
        i, public(i, Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    ),
    "HMAC with the JWK": lambda i: with_hmac(i, json.dumps(i.key.jwk).encode()),
    "HMAC with nothing": lambda i: with_hmac(i, b""),
    "PSS": lambda i: with_padding(i, "PS256", padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256()),
    "RS512": lambda i: with_padding(i, "RS512", padding.PKCS1v15(), hashes.SHA512()),
    "SHA-1 under the name RS256": lambda i: with_padding(i, "RS256", padding.PKCS1v15(), hashes.SHA1()),
    "another key's algorithm": lambda i: i.token(header={"alg": "ES256"}),
    "a key of the attacker's": of_stranger,
    "a key of the attacker's in the header": lambda i: of_stranger(i, jwk=lambda key: key.jwk, kid=None),
    "the issuer's own key in the header": lambda i: i.token(header={"jwk": i.key.jwk}),
    "a certificate": lambda i: i.token(header={"x5c": ["MIIB"]}),
    "an unknown extension that is critical": lambda i: i.token(
        header={"crit": ["http://example.com/x"], "http://example.com/x": 1}
    ),
    "a critical claim": lambda i: i.token(header={"crit": ["exp"], "exp": 1}),
    "nothing that is critical": lambda i: i.token(header={"crit": []}),
    "a critical extension that joserfc knows": lambda i: i.token(header={"crit": ["b64"], "b64": True}),
    "crit that is a number": lambda i: i.token(header={"crit": 1}),
    "an unencoded payload": lambda i: i.token(header={"crit": ["b64"], "b64": False}),
    "an unencoded payload, not critical": lambda i: i.token(header={"b64": False}),
    "b64 as ever": lambda i: i.token(header={"b64": True}),
    "compression": lambda i: i.token(header={"zip": "DEF"}),
    "encryption": encrypted,
    "an encrypted token's header": lambda i: i.token(header={"enc": "A256GCM"}),
    "no kid, and several keys": lambda i: in_two_keys(i, kid=None),
    "an empty kid": lambda i: i.token(header={"kid": ""}),
    "a kid that is a path": lambda i: i.token(header={"kid": "../../../../dev/null"}),
    "a kid that is a number": lambda i: i.token(header={"kid": 1}),
    "a kid that is a list": lambda i: i.token(header={"kid": ["key-1"]}),
    "another type of token": lambda i: i.token(header={"typ": "logout+jwt"}),
    "a type that is a number": lambda i: i.token(header={"typ": 1}),
    "too long": lambda i: i.token(filling="x" * TOKEN_LENGTH_MAX),
    "too deep": lambda i: i.token(deep=nested(100)),
    "far too deep": lambda i: raw(i, b'{"deep": ' + b"[" * 8000 + b"]" * 4),
    "a claim twice, the good one last": lambda i: raw(i, doubled(i, "org_id", "globex")),
    "a claim twice, in depth": lambda i: raw(i, doubled(i, "extra", 1).replace(b"1", b'{"a": 1, "a": 2}', 1)),
    "a header parameter twice": lambda i: i.key.signed(
        part(b'{"alg": "none", "alg": "RS256", "kid": "key-1"}'), part(i.claims())
    ),
    "a header that is a list": lambda i: i.key.signed(part(["RS256"]), part(i.claims())),
    "a header that is not JSON": lambda i: i.key.signed(part(b"RS256"), part(i.claims())),
    "claims that are a list": lambda i: raw(i, b"[]"),
    "claims that are not JSON": lambda i: raw(i, b"sub=alice"),
    "no claims": lambda i: raw(i, b""),
    "claims that are not UTF-8": lambda i: raw(i, json.dumps(i.claims(sub="al")).encode().replace(b"al", b"\xff\xfe")),
    "half a surrogate pair": lambda i: i.token(team="\ud800"),
    "NUL": lambda i: i.token(team="\0"),
    "no signature": lambda i: replaced(i.token(), 2, ""),
    "half a signature": lambda i: i.token()[:-100],
    "a signature in another spelling": lambda i: respelled(i.token()),
    "a signature with padding": lambda i: i.token() + "==",
    "a header in another spelling": lambda i: i.key.signed(
        respelled(part(b'{"alg": "RS256", "kid": "key-1"}')), part(i.claims())
    ),
    "claims in another spelling": lambda i: i.key.signed(
        part({"alg": "RS256"}), respelled(part(json.dumps(i.claims(sub="x" * _odd(i))).encode()))
    ),
    "a signature of zeros": of_zeros,
    "a signature in DER": in_der,
    "claims of another token": lambda i: replaced(i.token(), 1, part(i.claims(sub="root"))),
}

CLAIMED: dict[str, dict[str, Any]] = {
    "no issuer": {"iss": None},
    "another issuer": {"iss": "https://issuer.example.com"},
    "several issuers": {"iss": [ISSUER]},
    "no audience": {"aud": None},
    "another audience": {"aud": "external-agents-2"},
    "other audiences": {"aud": ["billing", "external"]},
    "an audience in an object": {"aud": {AUDIENCE: True}},
    "an audience among numbers": {"aud": [AUDIENCE, 1]},
    "no subject": {"sub": None},
    "an empty subject": {"sub": ""},
    "a subject that is a number": {"sub": 7},
    "a subject that is a list": {"sub": ["alice"]},
    "a subject with a line feed": {"sub": "alice\nroot"},
    "a subject too long": {"sub": "x" * 201},
    "no organisation": {"org_id": None},
    "an organisation with a space": {"org_id": "acme corp"},
    "an organisation with a line feed": {"org_id": "acme\n"},
    "an organisation too long": {"org_id": "x" * 101},
    "an organisation that is a list": {"org_id": ["acme"]},
    "no expiry": {"exp": None},
    "an expiry that is a string": {"exp": "1999999999"},
    "an expiry that is true": {"exp": True},
    "an expiry that is not a number": {"exp": float("nan")},
    "an expiry that is infinite": {"exp": float("inf")},
    "an expiry beyond a double": {"exp": 10**400},
    "permissions in a string": {"permissions": "read:external_agent"},
    "permissions with a number": {"permissions": ["read:external_agent", 1]},
    "permissions in an object": {"permissions": {"read:external_agent": True}},
}


def _odd(issuer: TokenIssuer) -> int:
    """How long a subject must be for claims that do not fill their last character."""
    return next(length for length in range(5, 9) if len(json.dumps(issuer.claims(sub="x" * length))) % 3 == 1)


def respelled(token: str) -> str:
    """What has no multiple of three bytes, such as a signature of 256, leaves bits of its last character unused."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return token[:-1] + letters[letters.index(token[-1]) + 1]


async def is_refused(api: httpx.AsyncClient, token: str) -> bool:
    answer = await call(api, token)
    assert is_problem(answer, 401, "unauthenticated")
    assert answer.headers["www-authenticate"] == 'Bearer realm="external-agents", error="invalid_token"'
    return True


@pytest.mark.parametrize("make", FORGED.values(), ids=FORGED)
async def test_a_forged_token_is_refused(api: httpx.AsyncClient, issuer: TokenIssuer, make: Make) -> None:
    assert await is_refused(api, make(issuer))
    assert (await call(api, issuer.token())).status_code == 200


@pytest.mark.parametrize("changes", CLAIMED.values(), ids=CLAIMED)
async def test_a_token_with_a_wrong_claim_is_refused(
    api: httpx.AsyncClient, issuer: TokenIssuer, changes: dict[str, Any]
) -> None:
    claims = {**issuer.claims(), **changes}
    assert await is_refused(api, issuer.key.token({name: value for name, value in claims.items() if value is not None}))


@pytest.mark.parametrize("claim", ["nbf", "iat", "permissions", "aud", "exp", "iss"])
async def test_null_is_no_absent_claim(api: httpx.AsyncClient, issuer: TokenIssuer, claim: str) -> None:
    assert await is_refused(api, issuer.key.token({**issuer.claims(), claim: None}))


@pytest.mark.parametrize(
    "header",
    [{"alg": "HS256"}, {"kid": 7}, {"kid": ["x"]}, {"typ": "logout+jwt"}, {"crit": ["x"]}, {"jwk": {}}],
    ids=str,
)
async def test_what_is_no_token_of_ours_costs_the_issuer_nothing(
    api: httpx.AsyncClient, issuer: TokenIssuer, header: dict[str, Any]
) -> None:
    assert await is_refused(api, issuer.token(header=header))
    assert issuer.fetches == 0


@pytest.mark.parametrize("parameter", ["jku", "x5u"])
async def test_no_key_is_fetched_from_where_a_token_says(
    api: httpx.AsyncClient, issuer: TokenIssuer, parameter: str
) -> None:
    stranger = SigningKey("RS256", rsa_name=1)
    async with serve_agent(Reply(body=json.dumps({"keys": [stranger.jwk]}).encode())) as theirs:
        assert await is_refused(api, stranger.token(issuer.claims(), **{parameter: theirs.url}))
        assert theirs.connections == 0
    assert await is_refused(api, issuer.token(header={parameter: issuer.url}))


@pytest.mark.parametrize(
    "header",
    [{}, {"typ": None}, {"typ": "at+jwt"}, {"typ": "application/at+JWT"}, {"kid": None}, {"nonce": "x", "x5t": "abc"}],
    ids=str,
)
async def test_what_issuers_put_into_good_headers(
    api: httpx.AsyncClient, issuer: TokenIssuer, header: dict[str, Any]
) -> None:
    answer = await call(api, issuer.token(header=header))
    assert answer.status_code == 200, answer.text


async def test_nothing_of_a_token_is_told(
    api: httpx.AsyncClient, issuer: TokenIssuer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    bad = [
        issuer.token(org_id=CANARY + " x"),
        issuer.token(sub=f"{CANARY}\n"),
        issuer.token(iss=CANARY),
        issuer.token(exp=CANARY),
        issuer.token(header={"kid": CANARY}),
        issuer.token(header={"typ": CANARY}),
        issuer.token(header={"crit": [CANARY]}),
        issuer.key.token(f"{{{CANARY}".encode()),
    ]
    answers = [await call(api, token) for token in bad]
    assert [answer.status_code for answer in answers] == [401] * len(bad)
    assert len({answer.text for answer in answers}) == 1
    assert CANARY not in answers[0].text
    assert "a JWT was refused: " in caplog.text
    assert CANARY not in caplog.text
    assert not any(piece in caplog.text for token in bad for piece in token.split("."))
