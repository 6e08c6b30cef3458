"""Turning what a caller sends into an agent, and an agent's secrets into sealed ones and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from uuid import UUID

import attrs

from external_agents.domain.agent import CHANGEABLE, DEFAULTS, AgentStatus, ExternalAgent
from external_agents.domain.auth import EVERYTHING, Credentials
from external_agents.domain.catalog import Catalog, join_secrets, split_secrets
from external_agents.domain.egress import Destination, UrlRules
from external_agents.domain.errors import Fault, SecretUnreadable, ValidationError
from external_agents.domain.json_values import JsonValue, decode, dumps, judged_value, merge_patch
from external_agents.domain.signing import PREVIOUS_SIGNING_SECRET, SIGNING_SECRET, SigningSecrets
from external_agents.ports.secrets import SecretBox, SecretContext

Document = Mapping[str, JsonValue]
"""A whole agent as its owner describes it, secrets included."""


@attrs.frozen(kw_only=True)
class Opened:
    """
    The secrets of an agent that an invocation needs, opened.

    Attributes:
        signing: None: requests to the agent are not signed.
    """

    credentials: Credentials
    signing: SigningSecrets | None


class Registrar:
    """Knows the catalog, the rules for URLs, and how secrets are kept."""

    def __init__(self, catalog: Catalog, url_rules: UrlRules, secret_box: SecretBox) -> None:
        self._catalog = catalog
        self._url_rules = url_rules
        self._secret_box = secret_box

    def check_auth_config(self, auth_type: JsonValue, config: JsonValue) -> None:
        """
        Raises:
            ValidationError: Every fault of the config.
        """
        config, faults = judged_value(config)
        _raise_if(faults + self._catalog.auth_faults(auth_type, config, self._url_rules, ""))

    def check_platform_config(self, provider: JsonValue, config: JsonValue) -> None:
        """
        Raises:
            ValidationError: Every fault of the config.
        """
        config, faults = judged_value(config)
        _raise_if(faults + self._catalog.platform_faults(provider, config, self._url_rules, ""))

    def register(self, document: JsonValue, *, agent_id: UUID, org_id: str, by: str, at: datetime) -> ExternalAgent:
        """
        Raises:
            ValidationError: Every fault of the document.
        """
        document, faults = judged_value(document)
        _raise_if(faults + self._catalog.agent_faults(document, self._url_rules))
        secret = document.get(SIGNING_SECRET)
        signing = None if secret is None else SigningSecrets(secret)
        return ExternalAgent(
            **self._fields({**DEFAULTS, **document}, signing, org_id, agent_id),
            id=agent_id,
            org_id=org_id,
            created_by=by,
            updated_by=by,
            created_at=at,
            updated_at=at,
        )

    def amend(self, agent: ExternalAgent, patch: JsonValue, *, by: str, at: datetime) -> ExternalAgent:
        """
        The agent changed by a JSON merge patch.

        Raises:
            ValidationError: Every fault of the patch and of the merged whole.
        """
        patch, faults = judged_value(patch)
        faults += self._catalog.patch_faults(patch)
        if not isinstance(patch, Mapping):
            raise ValidationError(faults)
        current = self._document(agent)
        if patch.get("auth_type") not in (None, agent.auth_type):
            del current["auth_config"]
        merged = merge_patch(current, {name: value for name, value in patch.items() if name in CHANGEABLE})
        faults += self._kept_secret_faults(agent, current, merged, patch)
        _raise_if(faults + self._catalog.agent_faults(merged, self._url_rules))
        signing = _replaced(self.signing_secrets(agent), merged.get(SIGNING_SECRET), at)
        return agent.changed(self._fields({**DEFAULTS, **merged}, signing, agent.org_id, agent.id), by=by, at=at)

    def opened(self, agent: ExternalAgent) -> Opened:
        """
        Raises:
            SecretUnreadable: An envelope cannot be opened.
        """
        return Opened(credentials=self.credentials(agent), signing=self.signing_secrets(agent))

    def credentials(self, agent: ExternalAgent) -> Credentials:
        """
        What the agent is to receive.

        Raises:
            SecretUnreadable: An envelope cannot be opened.
        """
        secrets = self._opened(agent, "auth_config")
        config = join_secrets(agent.auth_config, secrets, "auth_config")
        return self._catalog.auth_schemes[agent.auth_type].credentials(config)

    def signing_secrets(self, agent: ExternalAgent) -> SigningSecrets | None:
        """
        What requests to the agent are signed with.

        Raises:
            SecretUnreadable: An envelope cannot be opened.
        """
        secrets = self._opened(agent, SIGNING_SECRET)
        if SIGNING_SECRET not in secrets:
            return None
        previous = secrets.get(PREVIOUS_SIGNING_SECRET)
        return SigningSecrets(secrets[SIGNING_SECRET], previous, agent.previous_signing_secret_until)

    def resealed(self, agent: ExternalAgent, path: str) -> bytes:
        """
        The secret at a path in a new envelope.

        Raises:
            SecretUnreadable: Its envelope cannot be opened.
        """
        try:
            context = self._contexts(self._bound_fields(agent), agent.org_id, agent.id)(path)
        except (KeyError, TypeError, ValueError):
            raise SecretUnreadable("Its auth type or platform is not installed, or its row was altered.") from None
        return self._secret_box.seal(self._secret_box.open(agent.sealed[path], context), context)

    def _fields(
        self, document: Document, signing: SigningSecrets | None, org_id: str, agent_id: UUID
    ) -> dict[str, JsonValue]:
        scheme = self._catalog.auth_schemes[document["auth_type"]]
        platform = self._catalog.platforms[document["provider"]]
        auth_config, auth_secrets = split_secrets(document["auth_config"], scheme.secret_fields, "auth_config")
        platform_config, platform_secrets = split_secrets(
            document["platform_config"], platform.secret_fields, "platform_config"
        )
        secrets = {**auth_secrets, **platform_secrets, **_signing_by_path(signing)}
        contexts = self._contexts(document, org_id, agent_id)
        return {
            **{name: value for name, value in document.items() if name != SIGNING_SECRET},
            "auth_config": auth_config,
            "platform_config": platform_config,
            "rate_limit_config": _with_whole_numbers(document["rate_limit_config"]),
            "max_attempts": int(document["max_attempts"]),
            "tags": tuple(document["tags"]),
            "timeout_s": float(document["timeout_s"]),
            "status": AgentStatus(document["status"]),
            "sealed": {
                path: self._secret_box.seal(dumps(value).encode(), contexts(path)) for path, value in secrets.items()
            },
            "previous_signing_secret_until": signing.previous_until if signing else None,
        }

    def _document(self, agent: ExternalAgent) -> dict[str, JsonValue]:
        document: dict[str, JsonValue] = {
            "name": agent.name,
            "description": agent.description,
            "provider": agent.provider,
            "webhook_url": agent.webhook_url,
            "auth_type": agent.auth_type,
            "auth_config": agent.auth_config,
            "platform_config": agent.platform_config,
            "rate_limit_config": agent.rate_limit_config,
            "budget_config": agent.budget_config,
            "tags": list(agent.tags),
            "timeout_s": agent.timeout_s,
            "max_attempts": agent.max_attempts,
            "signing_secret": self._opened(agent, SIGNING_SECRET).get(SIGNING_SECRET),
            "status": agent.status.value,
        }
        for path in ("auth_config", "platform_config"):
            document[path] = join_secrets(document[path], self._opened(agent, path), path)
        return document

    def _opened(self, agent: ExternalAgent, config: str) -> dict[str, JsonValue]:
        """The secrets of one of the configs, or those for signing, by their paths."""
        contexts = self._contexts(self._bound_fields(agent), agent.org_id, agent.id)
        return {
            path: decode(self._secret_box.open(envelope, contexts(path)))
            for path, envelope in agent.sealed.items()
            if path.partition(".")[0] == config
        }

    def _bound_fields(self, agent: ExternalAgent) -> Document:
        return {
            "provider": agent.provider,
            "webhook_url": agent.webhook_url,
            "auth_type": agent.auth_type,
            "auth_config": agent.auth_config,
        }

    def _contexts(self, document: Document, org_id: str, agent_id: UUID) -> _Contexts:
        return _Contexts(
            org_id,
            str(agent_id),
            " ".join(self._auth_origins(document)),
            self._catalog.platforms[document["provider"]].secret_destination,
        )

    def _auth_origins(self, document: Document) -> list[str]:
        """Where the auth secrets go, or what they fetch: the origin of webhook_url, then those of the config's URLs."""
        scheme = self._catalog.auth_schemes[document["auth_type"]]
        urls = [document["webhook_url"], *(document["auth_config"][name] for name in scheme.url_fields)]
        return [Destination.of(url).origin for url in urls]

    def _kept_secret_faults(
        self, agent: ExternalAgent, current: Document, merged: Document, patch: Document
    ) -> Iterator[Fault]:
        """A secret that was entrusted for one origin does not follow the agent to another."""
        if "auth_config" not in current or not self._origin_changes(current, merged):
            return
        message = "must be sent again, because the origin that it goes to changes"
        given = patch.get("auth_config", {})
        if self._catalog.auth_schemes[agent.auth_type].secret_fields == EVERYTHING:
            if _keeps_any(current["auth_config"], given):
                yield Fault("auth_config", message)
            return
        for path in agent.sealed:
            name = path.removeprefix("auth_config.")
            if name != path and not (isinstance(given, Mapping) and name in given):
                yield Fault(path, message)

    def _origin_changes(self, current: Document, merged: Document) -> bool:
        try:
            return self._auth_origins(current) != self._auth_origins(merged)
        except (KeyError, TypeError, ValueError, AttributeError):
            # The merged document is invalid in itself, which agent_faults tells; a faulty URL is another one, too.
            return "auth_type" in merged


class _Contexts:
    def __init__(self, org_id: str, agent_id: str, auth_destination: str, platform_destination: str) -> None:
        self._org_id, self._agent_id = org_id, agent_id
        # A signing secret goes nowhere, so it is bound to no origin.
        self._destinations = {
            "auth_config": auth_destination,
            "platform_config": platform_destination,
            SIGNING_SECRET: "",
        }

    def __call__(self, path: str) -> SecretContext:
        return SecretContext(
            org_id=self._org_id,
            agent_id=self._agent_id,
            field=path,
            destination=self._destinations[path.partition(".")[0]],
        )


def _signing_by_path(signing: SigningSecrets | None) -> dict[str, str]:
    if signing is None:
        return {}
    previous = {} if signing.previous is None else {PREVIOUS_SIGNING_SECRET: signing.previous}
    return {SIGNING_SECRET: signing.current, **previous}


def _replaced(signing: SigningSecrets | None, secret: str | None, at: datetime) -> SigningSecrets | None:
    if signing is not None:
        return signing.replaced_by(secret, at)
    return None if secret is None else SigningSecrets(secret)


def _with_whole_numbers(config: JsonValue) -> JsonValue:
    """Limits are integers, also where they were sent as 60.0."""
    return None if config is None else {name: int(limit) for name, limit in config.items()}


def _keeps_any(stored: JsonValue, given: JsonValue) -> bool:
    """Whether merging `given` into `stored` leaves any stored value in place."""
    if not isinstance(stored, Mapping) or not isinstance(given, Mapping):
        return False
    return any(name not in given or _keeps_any(value, given[name]) for name, value in stored.items())


def _raise_if(faults: list[Fault]) -> None:
    if faults:
        raise ValidationError(faults)
