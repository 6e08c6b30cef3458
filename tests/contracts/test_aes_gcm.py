from __future__ import annotations

import pytest

from external_agents.adapters.secrets import AesGcmSecretBox, KeyRing
from external_agents.testing.secrets import SecretBoxContract


class TestAesGcmSecretBox(SecretBoxContract):
    @pytest.fixture
    def secret_box(self) -> AesGcmSecretBox:
        return AesGcmSecretBox(KeyRing({"k1": bytes(range(32))}))
