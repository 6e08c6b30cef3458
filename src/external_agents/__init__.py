"""
External agents under control: who may invoke them, how often, at what cost, with a durable record of every call.

The domain's values, the errors and the service stand here; the ports in `external_agents.ports`, adapters under
`external_agents.adapters`, each behind its extra, and the wiring of this project's own service in
`external_agents.bootstrap`.
"""

from external_agents.application.invocation import Invoked
from external_agents.application.parameters import AgentPage, InvocationPage
from external_agents.application.service import ExternalAgentService
from external_agents.application.usage import BudgetUsage, RateLimitUsage, Usage, WindowUsage
from external_agents.domain.access import AccessRequest, Action, Decision, Principal
from external_agents.domain.agent import AgentStatus, ExternalAgent
from external_agents.domain.auth import AuthScheme, ClientCredentials, FixedHeaders
from external_agents.domain.budget import BudgetConfig, Money
from external_agents.domain.catalog import Catalog
from external_agents.domain.egress import EgressPolicy
from external_agents.domain.errors import (
    AgentInactive,
    AgentNotFound,
    ConfigurationError,
    ExternalAgentsError,
    Fault,
    IllegalTransition,
    InvocationNotFound,
    MalformedJson,
    NotFound,
    PermissionDenied,
    SecretUnreadable,
    StaleVersion,
    Unauthenticated,
    Unavailable,
    ValidationError,
)
from external_agents.domain.invocation import Attempt, ErrorCode, ExternalAgentInvocation, InvocationStatus, Outcome
from external_agents.domain.json_values import JsonText
from external_agents.domain.platform import Platform
from external_agents.domain.rate_limit import Quota, RateQuotas, Window
from external_agents.domain.refusals import (
    AdmissionRefused,
    BudgetExceeded,
    IdempotencyKeyInFlight,
    IdempotencyKeyReused,
    RateLimited,
)

__all__ = [
    "AccessRequest",
    "Action",
    "AdmissionRefused",
    "AgentInactive",
    "AgentNotFound",
    "AgentPage",
    "AgentStatus",
    "Attempt",
    "AuthScheme",
    "BudgetConfig",
    "BudgetExceeded",
    "BudgetUsage",
    "Catalog",
    "ClientCredentials",
    "ConfigurationError",
    "Decision",
    "EgressPolicy",
    "ErrorCode",
    "ExternalAgent",
    "ExternalAgentInvocation",
    "ExternalAgentService",
    "ExternalAgentsError",
    "Fault",
    "FixedHeaders",
    "IdempotencyKeyInFlight",
    "IdempotencyKeyReused",
    "IllegalTransition",
    "InvocationNotFound",
    "InvocationPage",
    "InvocationStatus",
    "Invoked",
    "JsonText",
    "MalformedJson",
    "Money",
    "NotFound",
    "Outcome",
    "PermissionDenied",
    "Platform",
    "Principal",
    "Quota",
    "RateLimitUsage",
    "RateLimited",
    "RateQuotas",
    "SecretUnreadable",
    "StaleVersion",
    "Unauthenticated",
    "Unavailable",
    "Usage",
    "ValidationError",
    "Window",
    "WindowUsage",
]
