"""Access decisions by Cedar policies: the packaged guardrails, and a folder of one's own added to them."""

from external_agents.adapters.abac.decision_point import CedarPolicyDecisionPoint
from external_agents.adapters.abac.policies import CedarPolicies, LoadedPolicy

__all__ = ["CedarPolicies", "CedarPolicyDecisionPoint", "LoadedPolicy"]
