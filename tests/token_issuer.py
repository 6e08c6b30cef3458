"""
An issuer of JSON Web Tokens, with real keys and a real HTTP endpoint for them.

    async with serve_issuer() as issuer:
        token = issuer.token(sub="alice")
        issuer.rotate()
        assert issuer.fetches == 1
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from agents import Agent, Answer, Reply, Seen, serve_agent
from external_agents.adapters.identity.jwt import IssuerKeys, JwksEndpoint, JwtAuthenticator
from external_agents.ports.system import Clock

ISSUER = "https://issuer.example.com/"
AUDIENCE = "external-agents"
NOW = 1_773_144_000
"""FakeClock's start."""


def b64(octets: bytes) -> str:
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode()


def number(value: int, length: int | None = None) -> str:
    return b64(value.to_bytes(length or (value.bit_length() + 7) // 8))


def part(value: Any) -> str:
    return b64(value if isinstance(value, bytes) else json.dumps(value).encode())


@cache
def rsa_key(bits: int = 2048, name: int = 0) -> rsa.RSAPrivateKey:
    """Made once a test process: they take long."""
    return rsa.generate_private_key(65537, bits)


class SigningKey:
    """A private key of any of the three kinds; signs by `cryptography` alone, so that anything can be signed."""

    def __init__(self, algorithm: str = "ES256", kid: str | None = "key-1", rsa_name: int = 0) -> None:
        self.algorithm = algorithm
        self.kid = kid
        self.private: Any = {
            "RS256": lambda: rsa_key(name=rsa_name),
            "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
            "EdDSA": ed25519.Ed25519PrivateKey.generate,
        }[algorithm]()

    @property
    def jwk(self) -> dict[str, Any]:
        named = {} if self.kid is None else {"kid": self.kid}
        return {**named, "use": "sig", "alg": self.algorithm, **self._material()}

    def sign(self, octets: bytes) -> bytes:
        if self.algorithm == "RS256":
            return bytes(self.private.sign(octets, padding.PKCS1v15(), hashes.SHA256()))
        if self.algorithm == "EdDSA":
            return bytes(self.private.sign(octets))
        r, s = decode_dss_signature(self.private.sign(octets, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32) + s.to_bytes(32)

    def token(self, claims: Any, **header: Any) -> str:
        """`header`: changes to the usual one; None takes a parameter out."""
        usual = {"alg": self.algorithm, "typ": "JWT", "kid": self.kid}
        fields = {name: value for name, value in {**usual, **header}.items() if value is not None}
        return self.signed(part(fields), part(claims))

    def signed(self, header: str, payload: str) -> str:
        return f"{header}.{payload}.{b64(self.sign(f'{header}.{payload}'.encode()))}"

    def _material(self) -> dict[str, str]:
        if self.algorithm == "RS256":
            public = self.private.public_key().public_numbers()
            return {"kty": "RSA", "n": number(public.n), "e": number(public.e)}
        if self.algorithm == "EdDSA":
            return {"kty": "OKP", "crv": "Ed25519", "x": b64(self.private.public_key().public_bytes_raw())}
        public = self.private.public_key().public_numbers()
        return {"kty": "EC", "crv": "P-256", "x": number(public.x, 32), "y": number(public.y, 32)}


class TokenIssuer:
    """
    Attributes:
        key: What it signs with.
        published: What its key set holds, as JWKs.
        now: The time that its tokens go by, in seconds since 1970.
    """

    def __init__(self, server: Agent, now: float) -> None:
        self.server = server
        self.now = now
        self.key = SigningKey()
        self.published: list[Any] = [self.key.jwk]
        self._rotations = 1
        self.url = server.at("/jwks", self.reply)

    @property
    def fetches(self) -> int:
        return len(self.server.requests_at("/jwks"))

    def reply(self, seen: Seen) -> Reply:
        return Reply(body=json.dumps({"keys": self.published}).encode())

    def answers(self, *answers: Answer) -> None:
        """In place of its key set, which `recovers` brings back."""
        self.server.at("/jwks", *answers)

    def recovers(self) -> None:
        self.server.at("/jwks", self.reply)

    def rotate(self, *, keeps_old: bool = False) -> None:
        self._rotations += 1
        self.key = SigningKey(kid=f"key-{self._rotations}")
        self.published = [*(self.published if keeps_old else []), self.key.jwk]

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Those of a good token; None takes one out."""
        usual = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": "alice",
            "org_id": "acme",
            "exp": self.now + 300,
            "permissions": ["read:external_agent"],
        }
        return {name: value for name, value in {**usual, **changes}.items() if value is not None}

    def token(self, *, header: Mapping[str, Any] | None = None, **claims: Any) -> str:
        return self.key.token(self.claims(**claims), **(header or {}))


@asynccontextmanager
async def serve_issuer(now: float = NOW) -> AsyncIterator[TokenIssuer]:
    async with serve_agent() as server:
        yield TokenIssuer(server, now)


@asynccontextmanager
async def door_of(issuer: TokenIssuer, clock: Clock) -> AsyncIterator[JwtAuthenticator]:
    """Who takes the issuer's tokens."""
    keys = IssuerKeys(JwksEndpoint(issuer.url).fetch, clock)
    try:
        yield JwtAuthenticator(issuer=ISSUER, audience=AUDIENCE, keys=keys, clock=clock)
    finally:
        await keys.aclose()
