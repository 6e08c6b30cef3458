from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from external_agents.adapters.identity.jwt import JwtAuthenticator
from external_agents.domain.access import Principal
from external_agents.testing.fakes import FakeClock
from external_agents.testing.identity import AuthenticatorContract, Issue
from token_issuer import SigningKey, TokenIssuer, door_of, serve_issuer


@pytest.fixture
async def issuer() -> AsyncIterator[TokenIssuer]:
    async with serve_issuer() as issuer:
        yield issuer


class _JwtAuthenticatorContract(AuthenticatorContract):
    algorithm: str

    @pytest.fixture
    async def authenticator(self, issuer: TokenIssuer) -> AsyncIterator[JwtAuthenticator]:
        issuer.key = SigningKey(self.algorithm)
        issuer.published = [issuer.key.jwk]
        async with door_of(issuer, FakeClock()) as door:
            yield door

    @pytest.fixture
    def issue(self, issuer: TokenIssuer) -> Issue:
        async def issue(principal: Principal) -> str:
            return issuer.token(
                org_id=principal.org_id,
                sub=principal.subject,
                permissions=sorted(principal.permissions),
                **principal.attributes,
            )

        return issue


class TestRsa(_JwtAuthenticatorContract):
    algorithm = "RS256"


class TestEcdsa(_JwtAuthenticatorContract):
    algorithm = "ES256"


class TestEddsa(_JwtAuthenticatorContract):
    algorithm = "EdDSA"
