from __future__ import annotations

import pytest

from external_agents.adapters.identity import ApiKeyAuthenticator, ApiKeys
from external_agents.adapters.memory.identity import MemoryApiKeyStore
from external_agents.adapters.secrets import KeyRing
from external_agents.domain.access import Principal
from external_agents.testing.fakes import FakeClock, SequentialIds
from external_agents.testing.identity import AuthenticatorContract, Issue

RING = KeyRing({"k1": bytes(range(32))})


class TestApiKeyAuthenticator(AuthenticatorContract):
    @pytest.fixture
    def store(self) -> MemoryApiKeyStore:
        return MemoryApiKeyStore()

    @pytest.fixture
    def authenticator(self, store: MemoryApiKeyStore) -> ApiKeyAuthenticator:
        return ApiKeyAuthenticator(store=store, key_ring=RING, clock=FakeClock())

    @pytest.fixture
    def issue(self, store: MemoryApiKeyStore) -> Issue:
        clock = FakeClock()
        keys = ApiKeys(store=store, key_ring=RING, clock=clock, ids=SequentialIds(clock))

        async def issue(principal: Principal) -> str:
            text, _ = await keys.issue(
                principal.org_id, principal.subject, principal.permissions, dict(principal.attributes)
            )
            return text

        return issue
