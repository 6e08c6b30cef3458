from __future__ import annotations

import pytest

from external_agents.adapters.abac import CedarPolicies, CedarPolicyDecisionPoint
from external_agents.testing.policy import PolicyContract


class TestCedarPolicies(PolicyContract):
    @pytest.fixture
    def policy(self) -> CedarPolicyDecisionPoint:
        return CedarPolicyDecisionPoint(CedarPolicies.load())
