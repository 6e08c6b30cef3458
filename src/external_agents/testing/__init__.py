"""
What a host proves its own adapters with: contract suites, hypothesis strategies, builders and fakes.

Needs pytest and pytest-asyncio (`asyncio_mode = "auto"`); `strategies` needs hypothesis. A suite is a class of tests to
derive from; its docstring names the fixtures that the derived class, or its module, provides:

    class TestMyRepository(AgentRepositoryContract):
        @pytest.fixture
        def store(self) -> Store: ...

Every test works in organisations of its own, so one store may serve all of them.
"""

import pytest

SUITES = (
    *("idempotency", "identity", "ledger", "ledger_time", "ledger_verdict"),
    *("policy", "rate_limits", "repositories", "secrets"),
)

pytest.register_assert_rewrite(*(f"{__name__}.{suite}" for suite in SUITES))
