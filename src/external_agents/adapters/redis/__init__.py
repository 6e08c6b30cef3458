"""Rate limits in Redis: one script, one key an agent, one round trip for all callers of the moment."""

from __future__ import annotations

from external_agents.adapters.redis.connection import RedisConnection
from external_agents.adapters.redis.rate_limiter import RedisRateLimiter
from external_agents.adapters.redis.readiness import RedisCheck, RedisReadiness

__all__ = ["RedisCheck", "RedisConnection", "RedisRateLimiter", "RedisReadiness"]
