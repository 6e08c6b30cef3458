"""Secrets at rest: the service's key ring, and AES-256-GCM envelopes made with it."""

from external_agents.adapters.secrets.aes_gcm import AesGcmSecretBox, envelope_key_id
from external_agents.adapters.secrets.key_ring import KeyRing

__all__ = ["AesGcmSecretBox", "KeyRing", "envelope_key_id"]
