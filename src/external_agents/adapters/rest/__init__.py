"""The API over HTTP: a Falcon ASGI app, for a server of its own or mounted inside another application."""

from external_agents.adapters.rest.app import LogContext, create_app
from external_agents.adapters.rest.health import Readiness
from external_agents.adapters.rest.lifespan import LifespanApp
from external_agents.adapters.rest.metrics import Exposition, RequestObserver
from external_agents.adapters.rest.resources import API_PREFIX

__all__ = ["API_PREFIX", "Exposition", "LifespanApp", "LogContext", "Readiness", "RequestObserver", "create_app"]
