"""Our worker of gunicorn, with little patience, for tests that see what becomes of slow callers."""

from __future__ import annotations

from external_agents.adapters.rest.connection import Patience
from external_agents.adapters.rest.worker import Worker


class HastyWorker(Worker):
    patience = Patience(head_s=2.0, answer_s=2.0)
