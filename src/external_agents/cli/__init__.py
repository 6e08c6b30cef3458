"""The command `external-agents`."""

from __future__ import annotations

import sys


def main() -> None:
    """Where the command begins; without the extra that it needs, it says so."""
    try:
        from external_agents.cli.app import run
    except ModuleNotFoundError as missing:
        sys.exit(f"external-agents: {missing.name} is not installed; pip install 'external-agents[serve]'")
    sys.exit(run())
