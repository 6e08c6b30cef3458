"""What happened, as structured log lines on stderr."""

from external_agents.adapters.telemetry.logging_setup import configure_logging, logging_config
from external_agents.adapters.telemetry.records import StructlogObservability

__all__ = ["StructlogObservability", "configure_logging", "logging_config"]
