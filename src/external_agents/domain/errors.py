"""Everything this library raises on purpose, under one root."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import ClassVar
from uuid import UUID

import attrs


class ExternalAgentsError(Exception):
    """Catch this to catch every error of the library; the message is one line, without secrets, fit for a caller."""


@attrs.frozen(order=True)
class Fault:
    """One fault of an input: where it stands (`auth_config.client_id`, `tags[2]`; empty: the whole), and what."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


FAULTS_MAX = 1000


class ValidationError(ExternalAgentsError):
    """The input is wrong. `errors` names every fault, up to 1,000; mend them all and send it again."""

    def __init__(self, errors: Iterable[Fault]) -> None:
        self.errors = tuple(sorted(set(islice(errors, FAULTS_MAX))))
        assert self.errors, "a validation error names at least one fault"
        super().__init__("; ".join(map(str, self.errors)))


class MalformedJson(ExternalAgentsError):
    """The bytes are not JSON text in UTF-8, or are nested too deeply. Nothing of it was read."""


class Unauthenticated(ExternalAgentsError):
    """The credentials are missing, unknown, expired or revoked. Which of these is not told."""


class PermissionDenied(ExternalAgentsError):
    """The policies do not allow this action. Ask whoever gives out permissions."""


class NotFound(ExternalAgentsError):
    """Nothing with this id exists in the caller's organisation."""

    what: ClassVar[str] = "record"

    def __init__(self) -> None:
        super().__init__(f"No such {self.what}.")


class AgentNotFound(NotFound):
    """No such agent in the caller's organisation, or it has been deleted."""

    what = "agent"


class InvocationNotFound(NotFound):
    """No such invocation of this agent in the caller's organisation."""

    what = "invocation"


class IllegalTransition(ExternalAgentsError):
    """A status cannot follow another; the lifecycle's table says which can."""

    def __init__(self, current: str, wanted: str) -> None:
        super().__init__(f"{current} cannot become {wanted}.")


class StaleVersion(ExternalAgentsError):
    """The agent has changed since it was read. Read it again and decide anew."""

    def __init__(self) -> None:
        super().__init__("The agent has changed since it was read.")


class AgentInactive(ExternalAgentsError):
    """The agent is switched off. Set its status to active to invoke it."""

    def __init__(self) -> None:
        super().__init__("The agent is inactive.")


class Unavailable(ExternalAgentsError):
    """
    Something this service stands on is down, or a queue is full. Try again after `retry_after_s` seconds.

    `invocation_id` is set when an invocation was admitted and its outcome could not be stored yet: look it up instead
    of sending it again.
    """

    def __init__(self, what: str, *, retry_after_s: int = 5, invocation_id: UUID | None = None) -> None:
        super().__init__(f"{what} is not available.")
        self.retry_after_s = retry_after_s
        self.invocation_id = invocation_id


class AdmissionInDoubt(Unavailable):
    """Whether the invocation was admitted is unknown. It was not sent and will not be; recovery ends what there is."""


class SecretUnreadable(ExternalAgentsError):
    """A sealed secret cannot be opened: its key id is not configured, or it was altered or moved."""


class ConfigurationError(ExternalAgentsError):
    """The service cannot run as it is set up; the message says what to change."""
