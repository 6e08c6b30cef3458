"""Recognising callers by the JSON Web Tokens of one issuer, whose public keys it publishes (RFC 7519, RFC 7517)."""

from external_agents.adapters.identity.jwt.authenticator import JwtAuthenticator
from external_agents.adapters.identity.jwt.issuer_keys import IssuerKeys
from external_agents.adapters.identity.jwt.jwks_endpoint import JwksEndpoint
from external_agents.adapters.identity.jwt.key_set import KeySet, KeySetUnavailable

__all__ = ["IssuerKeys", "JwksEndpoint", "JwtAuthenticator", "KeySet", "KeySetUnavailable"]
