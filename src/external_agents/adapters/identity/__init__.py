"""Recognising callers: API keys, kept as keyed hashes, and, by `identity.jwt`, the tokens of an issuer."""

from external_agents.adapters.identity.api_keys import ApiKeyAuthenticator, ApiKeys
from external_agents.adapters.identity.by_form import ByForm
from external_agents.adapters.identity.tokens import ApiKeyToken

__all__ = ["ApiKeyAuthenticator", "ApiKeyToken", "ApiKeys", "ByForm"]
