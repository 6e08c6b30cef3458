"""What stands against an invocation that was well asked for: an earlier one, a limit, a budget."""

from __future__ import annotations

from external_agents.domain.errors import ExternalAgentsError
from external_agents.domain.rate_limit import RateQuotas


class AdmissionRefused(ExternalAgentsError):
    """A limit stands against this invocation; nothing was recorded and nothing was sent."""

    def __init__(self, message: str, quotas: RateQuotas) -> None:
        super().__init__(message)
        self.quotas = quotas


class RateLimited(AdmissionRefused):
    """Too many invocations in a window. The next one would be admitted after `retry_after_s` seconds."""

    def __init__(self, window: str, retry_after_s: int, quotas: RateQuotas) -> None:
        super().__init__(f"The limit of invocations per {window} is reached.", quotas)
        self.retry_after_s = retry_after_s


class BudgetExceeded(AdmissionRefused):
    """Spent plus reserved would pass the monthly cap. Raise the cap, or wait for settlements or the next month."""

    def __init__(self, quotas: RateQuotas) -> None:
        super().__init__("The agent's monthly budget does not cover another invocation.", quotas)


class IdempotencyKeyReused(ExternalAgentsError):
    """The Idempotency-Key was used with another payload. Take a new key for a new invocation."""

    def __init__(self) -> None:
        super().__init__("The idempotency key was used before, with another payload.")


class IdempotencyKeyInFlight(ExternalAgentsError):
    """The first invocation with this Idempotency-Key has not ended yet. Ask again after `retry_after_s` seconds."""

    def __init__(self, retry_after_s: int = 1) -> None:
        super().__init__("The invocation that this idempotency key belongs to has not ended yet.")
        self.retry_after_s = retry_after_s
