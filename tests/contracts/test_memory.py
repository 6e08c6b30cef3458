"""The contract suites over the adapters in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from external_agents.adapters.memory import (
    MemoryAgentReader,
    MemoryAgentWriter,
    MemoryApiKeyStore,
    MemoryAuthenticator,
    MemoryInvocationReader,
    MemoryLedger,
    MemoryRateLimiter,
    MemorySecretBox,
    MemoryStore,
    PermissionPolicy,
)
from external_agents.application.limited_ledger import LimitedLedger
from external_agents.domain.access import Principal
from external_agents.ports.ledger import InvocationLedger
from external_agents.testing.fakes import FakeClock
from external_agents.testing.idempotency import IdempotencyContract
from external_agents.testing.identity import ApiKeyStoreContract, AuthenticatorContract, Issue
from external_agents.testing.ledger import LedgerContract
from external_agents.testing.ledger_time import LedgerTimeContract
from external_agents.testing.ledger_verdict import LedgerVerdictContract
from external_agents.testing.policy import PolicyContract
from external_agents.testing.rate_limits import NewLimiter, RateLimiterContract
from external_agents.testing.repositories import AgentRepositoryContract, InvocationReaderContract
from external_agents.testing.secrets import SecretBoxContract
from external_agents.testing.stores import PassTime, Store


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def pass_time(clock: FakeClock) -> PassTime:
    async def pass_time(seconds: float) -> None:
        clock.advance(seconds)

    return pass_time


def store_of(memory: MemoryStore, clock: FakeClock, limited: Callable[[InvocationLedger], InvocationLedger]) -> Store:
    async def new_ledger() -> InvocationLedger:
        ledger = limited(MemoryLedger(memory, clock))
        await ledger.heartbeat()
        return ledger

    return Store(
        agent_reader=MemoryAgentReader(memory),
        agent_writer=MemoryAgentWriter(memory),
        invocation_reader=MemoryInvocationReader(memory),
        new_ledger=new_ledger,
        now=clock.now,
    )


@pytest.fixture
def store(clock: FakeClock) -> Store:
    return store_of(MemoryStore(), clock, lambda ledger: ledger)


@pytest.fixture
def limited_store(clock: FakeClock) -> Store:
    """The limits of its ledgers are kept apart from it."""
    limiter = MemoryRateLimiter(clock)
    return store_of(MemoryStore(), clock, lambda ledger: LimitedLedger(ledger, limiter))


class TestMemoryAgentRepository(AgentRepositoryContract):
    pass


class TestMemoryInvocationReader(InvocationReaderContract):
    pass


class TestMemoryLedger(LedgerContract):
    pass


class TestMemoryLedgerOverTime(LedgerTimeContract):
    pass


class TestMemoryIdempotency(IdempotencyContract):
    pass


class TestMemoryLedgerWithVerdicts(LedgerVerdictContract):
    pass


class TestLimitedMemoryLedger(LedgerContract):
    @pytest.fixture
    def store(self, limited_store: Store) -> Store:
        return limited_store


class TestLimitedMemoryLedgerOverTime(LedgerTimeContract):
    @pytest.fixture
    def store(self, limited_store: Store) -> Store:
        return limited_store


class TestLimitedMemoryIdempotency(IdempotencyContract):
    @pytest.fixture
    def store(self, limited_store: Store) -> Store:
        return limited_store


class TestMemoryRateLimiter(RateLimiterContract):
    @pytest.fixture
    def new_limiter(self, clock: FakeClock) -> NewLimiter:
        limiter = MemoryRateLimiter(clock)
        return lambda: limiter


class TestMemoryApiKeyStore(ApiKeyStoreContract):
    @pytest.fixture
    def api_keys(self) -> MemoryApiKeyStore:
        return MemoryApiKeyStore()


class TestMemoryAuthenticator(AuthenticatorContract):
    @pytest.fixture
    def authenticator(self) -> MemoryAuthenticator:
        return MemoryAuthenticator()

    @pytest.fixture
    def issue(self, authenticator: MemoryAuthenticator) -> Issue:
        async def issue(principal: Principal) -> str:
            return authenticator.issue(principal)

        return issue


class TestPermissionPolicy(PolicyContract):
    @pytest.fixture
    def policy(self) -> PermissionPolicy:
        return PermissionPolicy()


class TestMemorySecretBox(SecretBoxContract):
    @pytest.fixture
    def secret_box(self) -> MemorySecretBox:
        return MemorySecretBox()
