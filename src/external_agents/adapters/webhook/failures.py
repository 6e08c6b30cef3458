"""What it amounts to when there is no answer that could be taken."""

from __future__ import annotations

import ssl
from collections.abc import Iterator

import aiohttp
from aiohttp.http_exceptions import LineTooLong

from external_agents.adapters.webhook.journey import Journey
from external_agents.domain.invocation import ErrorCode, Outcome


class Unanswered(Exception):
    """There is no answer that could be taken."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.message)
        self.outcome = outcome


def refused(to: str) -> Unanswered:
    """The egress rules stand against it. Nothing of where it would have led is told."""
    return _unanswered(ErrorCode.EGRESS_REFUSED, f"{to}'s URL leads to where requests may not go.", ran=False)


def late(to: str, journey: Journey) -> Unanswered:
    """The deadline has passed."""
    what = "did not answer in time" if journey.reached else "could not be reached in time"
    return _unanswered(ErrorCode.TIMEOUT, f"{to} {what}.", ran=journey.reached)


def switched_protocols(to: str) -> Unanswered:
    """A 101 to a request that did not ask for it."""
    return _unanswered(ErrorCode.CONNECTION_FAILED, f"{to} answered with another protocol.", ran=True)


def encoded(to: str, status: int) -> Unanswered:
    what = "has a content coding, which was not asked for"
    return _unanswered(ErrorCode.RESPONSE_ENCODED, f"{to}'s answer {what}.", ran=_succeeded(status), status=status)


def too_large(to: str, status: int, limit_bytes: int) -> Unanswered:
    what = f"has over {limit_bytes} bytes"
    return _unanswered(ErrorCode.RESPONSE_TOO_LARGE, f"{to}'s answer {what}.", ran=_succeeded(status), status=status)


def broken(to: str, journey: Journey, error: BaseException) -> Unanswered:
    """The network, or what came over it, put an end to it."""
    if journey.refused:
        return refused(to)
    causes = list(_causes(error))
    if journey.reached:
        if journey.flooded or any(isinstance(cause, LineTooLong) for cause in causes):
            return _unanswered(ErrorCode.RESPONSE_TOO_LARGE, f"{to}'s answer has too much around its body.", ran=True)
        return _unanswered(ErrorCode.CONNECTION_FAILED, f"{to} gave no complete answer.", ran=True)
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
        what = "shows a certificate that is not trusted"
    elif any(isinstance(cause, ssl.SSLError) for cause in causes):
        what = "does not speak TLS as it should"
    elif any(isinstance(cause, aiohttp.ClientConnectorDNSError) for cause in causes):
        what = "has a name that could not be resolved"
    else:
        what = "could not be reached"
    return _unanswered(ErrorCode.CONNECTION_FAILED, f"{to} {what}.", ran=False)


def _unanswered(error: ErrorCode, message: str, *, ran: bool, status: int | None = None) -> Unanswered:
    return Unanswered(Outcome(error=error, status=status, message=message, may_have_run=ran))


def _succeeded(status: int) -> bool:
    return 200 <= status <= 299


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
