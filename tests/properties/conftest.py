"""How hard hypothesis tries here; `--hypothesis-profile=thorough` tries fifty times as hard."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("suite", max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", parent=settings.get_profile("suite"), max_examples=5000)
settings.load_profile("suite")
