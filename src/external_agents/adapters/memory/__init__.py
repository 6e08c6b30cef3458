"""Every port in process: for embedding where nothing has to last, and for fast tests. Needs the core alone."""

from __future__ import annotations

from external_agents.adapters.memory.identity import MemoryApiKeyStore, MemoryAuthenticator
from external_agents.adapters.memory.ledger import MemoryLedger
from external_agents.adapters.memory.observability import MemoryObservability
from external_agents.adapters.memory.policy import PermissionPolicy
from external_agents.adapters.memory.rate_limiter import MemoryRateLimiter
from external_agents.adapters.memory.repositories import MemoryAgentReader, MemoryAgentWriter, MemoryInvocationReader
from external_agents.adapters.memory.secrets import MemorySecretBox
from external_agents.adapters.memory.store import MemoryStore
from external_agents.adapters.memory.system import SystemClock, SystemIds
from external_agents.adapters.memory.transport import FunctionTransport
from external_agents.application.service import ExternalAgentService
from external_agents.domain.catalog import BUILT_IN, Catalog
from external_agents.domain.egress import EgressPolicy, UrlRules
from external_agents.ports.identity import Authenticator
from external_agents.ports.ledger import InvocationLedger
from external_agents.ports.observability import ObservabilityManager
from external_agents.ports.policy import PolicyDecisionPoint
from external_agents.ports.secrets import SecretBox
from external_agents.ports.system import Clock, IdSource
from external_agents.ports.transport import AgentTransport

__all__ = [
    "FunctionTransport",
    "MemoryAgentReader",
    "MemoryAgentWriter",
    "MemoryApiKeyStore",
    "MemoryAuthenticator",
    "MemoryInvocationReader",
    "MemoryLedger",
    "MemoryObservability",
    "MemoryRateLimiter",
    "MemorySecretBox",
    "MemoryStore",
    "PermissionPolicy",
    "SystemClock",
    "SystemIds",
    "memory_service",
]


def memory_service(
    transport: AgentTransport,
    *,
    store: MemoryStore | None = None,
    ledger: InvocationLedger | None = None,
    policy: PolicyDecisionPoint | None = None,
    secret_box: SecretBox | None = None,
    observability: ObservabilityManager | None = None,
    url_rules: UrlRules | None = None,
    clock: Clock | None = None,
    ids: IdSource | None = None,
    authenticator: Authenticator | None = None,
    catalog: Catalog = BUILT_IN,
) -> ExternalAgentService:
    """
    The service on adapters of this package, but for those that are given.

    Nothing outlives the process, and the agents, invocations and secrets are never dropped: for embedding of that kind
    and for tests. Keep a reference to the `store` that you give to look into it.
    """
    store = store or MemoryStore()
    clock = clock or SystemClock()
    return ExternalAgentService(
        agent_reader=MemoryAgentReader(store),
        agent_writer=MemoryAgentWriter(store),
        invocation_reader=MemoryInvocationReader(store),
        ledger=ledger or MemoryLedger(store, clock),
        policy=policy or PermissionPolicy(),
        transport=transport,
        secret_box=secret_box or MemorySecretBox(),
        observability=observability or MemoryObservability(),
        url_rules=url_rules or EgressPolicy(),
        clock=clock,
        ids=ids or SystemIds(),
        authenticator=authenticator,
        catalog=catalog,
    )
