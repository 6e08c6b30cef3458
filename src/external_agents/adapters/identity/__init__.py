"""Recognising callers: API keys, kept as keyed hashes."""

from external_agents.adapters.identity.api_keys import ApiKeyAuthenticator, ApiKeys
from external_agents.adapters.identity.tokens import ApiKeyToken

__all__ = ["ApiKeyAuthenticator", "ApiKeyToken", "ApiKeys"]
