"""What happened, as structured log lines on stderr, and as metrics for Prometheus."""

from external_agents.adapters.telemetry.fan_out import FanOut
from external_agents.adapters.telemetry.logging_setup import configure_logging, logging_config
from external_agents.adapters.telemetry.records import StructlogObservability
from external_agents.adapters.telemetry.request_context import RequestContext

__all__ = ["FanOut", "RequestContext", "StructlogObservability", "configure_logging", "logging_config"]
