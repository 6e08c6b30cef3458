"""The auth types and platforms that this installation knows, and the rules that follow from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import chain
from typing import TypeGuard, TypeVar

from external_agents.domain import agent as agent_rules
from external_agents.domain.auth import AUTH_SCHEMES, EVERYTHING, AuthScheme
from external_agents.domain.budget import decimals_faults
from external_agents.domain.egress import UrlRules
from external_agents.domain.errors import ConfigurationError, Fault
from external_agents.domain.json_values import JsonValue, join_path
from external_agents.domain.platform import PLATFORMS, Platform
from external_agents.domain.schema import Schema

T = TypeVar("T")


class Catalog:
    """
    Auth types and platforms by name, immutable. `extended` gives a larger one.

    Raises:
        ConfigurationError: When made with one name twice.
    """

    def __init__(
        self, auth_schemes: Iterable[AuthScheme] = AUTH_SCHEMES, platforms: Iterable[Platform] = PLATFORMS
    ) -> None:
        self.auth_schemes = _by_name((scheme.auth_type, scheme) for scheme in auth_schemes)
        self.platforms = _by_name((platform.provider, platform) for platform in platforms)
        self._auth = {name: Schema(scheme.schema) for name, scheme in self.auth_schemes.items()}
        self._platform = {name: Schema(platform.schema) for name, platform in self.platforms.items()}

    def extended(self, auth_schemes: Iterable[AuthScheme] = (), platforms: Iterable[Platform] = ()) -> Catalog:
        return Catalog(chain(self.auth_schemes.values(), auth_schemes), chain(self.platforms.values(), platforms))

    @cached_property
    def agent_properties(self) -> dict[str, JsonValue]:
        """JSON Schemas of the fields that a caller sets."""
        return {
            **agent_rules.AGENT_PROPERTIES,
            "auth_type": {"type": "string", "enum": list(self.auth_schemes)},
            "provider": {"type": "string", "enum": list(self.platforms)},
        }

    @cached_property
    def create_schema(self) -> Schema:
        """The body that registers an agent."""
        return Schema(
            {
                "type": "object",
                "properties": self.agent_properties,
                "required": list(agent_rules.REQUIRED_TO_CREATE),
                "additionalProperties": False,
            }
        )

    @cached_property
    def patch_schema(self) -> Schema:
        """The merge patch of an agent: which fields it may name; their values are judged in the merged whole."""
        names = [name for name in self.agent_properties if name not in agent_rules.FIXED_AFTER_CREATION]
        return Schema({"type": "object", "properties": {name: {} for name in names}, "additionalProperties": False})

    def auth_faults(self, auth_type: JsonValue, config: JsonValue, urls: UrlRules, path: str) -> list[Fault]:
        """Every fault of an auth_config, secrets included."""
        if not _names(auth_type, self.auth_schemes):
            return [Fault("auth_type", f"must be one of {', '.join(self.auth_schemes)}")]
        faults = self._auth[auth_type].faults(config, path)
        return faults + list(_url_faults(self.auth_schemes[auth_type].url_fields, config, urls, path, faults))

    def platform_faults(self, provider: JsonValue, config: JsonValue, urls: UrlRules, path: str) -> list[Fault]:
        """Every fault of a platform_config, secrets included."""
        if not _names(provider, self.platforms):
            return [Fault("provider", f"must be one of {', '.join(self.platforms)}")]
        faults = self._platform[provider].faults(config, path)
        return faults + list(_url_faults(self.platforms[provider].url_fields, config, urls, path, faults))

    def patch_faults(self, patch: JsonValue) -> list[Fault]:
        """Every field of a merge patch that an agent does not have, or that is fixed."""
        fixed = [name for name in agent_rules.FIXED_AFTER_CREATION if isinstance(patch, Mapping) and name in patch]
        faults = [fault for fault in self.patch_schema.faults(patch) if fault.path not in fixed]
        return faults + [Fault(name, "cannot be changed") for name in fixed]

    def agent_faults(self, document: JsonValue, urls: UrlRules) -> list[Fault]:
        """Every fault of a whole agent as its owner describes it, secrets included."""
        faults = self.create_schema.faults(_cut(document))
        if isinstance(document, Mapping):
            faults += self._config_faults(document, urls)
            if isinstance(document.get("budget_config"), Mapping):
                faults += decimals_faults(document["budget_config"])
            faults += _url_faults(("webhook_url",), document, urls, "", faults)
        return faults

    def _config_faults(self, document: Mapping[str, JsonValue], urls: UrlRules) -> Iterator[Fault]:
        auth_type, provider = document.get("auth_type"), document.get("provider")
        if "auth_config" in document and isinstance(document["auth_config"], Mapping) and auth_type is not None:
            yield from self.auth_faults(auth_type, document["auth_config"], urls, "auth_config")
        elif (
            "auth_config" not in document
            and auth_type != "none"
            and ("auth_type" not in document or _names(auth_type, self.auth_schemes))
        ):
            yield Fault("auth_config", "is required")
        if "platform_config" in document and isinstance(document["platform_config"], Mapping) and provider is not None:
            yield from self.platform_faults(provider, document["platform_config"], urls, "platform_config")
        elif "platform_config" not in document and (
            "provider" not in document
            or (_names(provider, self.platforms) and self.platforms[provider].config_required)
        ):
            yield Fault("platform_config", "is required")


def split_secrets(
    config: Mapping[str, JsonValue], secret_fields: frozenset[str], path: str
) -> tuple[dict[str, JsonValue], dict[str, JsonValue]]:
    """The public part of a config, and its secrets by path."""
    if secret_fields == EVERYTHING:
        return {}, ({path: dict(config)} if config else {})
    public = {name: value for name, value in config.items() if name not in secret_fields}
    return public, {join_path(path, name): value for name, value in config.items() if name in secret_fields}


def join_secrets(public: Mapping[str, JsonValue], secrets: Mapping[str, JsonValue], path: str) -> dict[str, JsonValue]:
    """The config that `split_secrets` took apart."""
    if path in secrets:
        return dict(secrets[path])
    prefix = f"{path}."
    return {
        **public,
        **{name.removeprefix(prefix): value for name, value in secrets.items() if name.startswith(prefix)},
    }


def _names(name: JsonValue, known: Mapping[str, T]) -> TypeGuard[str]:
    """Whether `name`, any JSON value, is the name of one of `known`."""
    return isinstance(name, str) and name in known


def _cut(document: JsonValue) -> JsonValue:
    """Without the tags that are over the limit: one too many says as much as a hundred thousand, and sooner."""
    if isinstance(document, Mapping) and isinstance(tags := document.get("tags"), list):
        return {**document, "tags": tags[: agent_rules.TAGS_MAX + 1]}
    return document


def _by_name(pairs: Iterable[tuple[str, T]]) -> dict[str, T]:
    result: dict[str, T] = {}
    for name, item in pairs:
        if name in result:
            raise ConfigurationError(f"{name!r} is registered twice.")
        result[name] = item
    return result


def _url_faults(
    fields: tuple[str, ...], config: JsonValue, urls: UrlRules, path: str, told: list[Fault]
) -> Iterator[Fault]:
    named = {fault.path for fault in told}
    for field in fields:
        member = join_path(path, field)
        if isinstance(config, Mapping) and isinstance(config.get(field), str) and member not in named:
            yield from (Fault(member, message) for message in urls.url_faults(config[field]))


BUILT_IN = Catalog()
