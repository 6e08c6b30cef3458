"""What the service is told by its environment: the variables that begin with EXTERNAL_AGENTS_."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import attrs
import environ

from external_agents.domain.egress import EgressPolicy
from external_agents.domain.errors import ConfigurationError

PREFIX = "EXTERNAL_AGENTS"
LOG_FORMATS = ("console", "json")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
MAX_BODY_BYTES_BOUNDS = (1_024, 268_435_456)
SHARD_GROUPS_MAX = 4_096
PORT_MAX = 65_535
JWT_FIELDS = ("jwt_issuer", "jwt_audience", "jwt_jwks_url")

_LISTEN_ADDRESS = re.compile(r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+)):(?P<port>[0-9]{1,5})")


def _database_url(url: str | None) -> str | None:
    """Any of the spellings of a PostgreSQL URL, as SQLAlchemy's with psycopg 3."""
    if url is None:
        return None
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in {"postgresql", "postgres", "postgresql+psycopg"}:
        raise ValueError("must begin with postgresql://")
    try:
        urlsplit(f"postgresql://{rest}").port  # noqa: B018  it judges when it is asked
    except ValueError:
        # What is wrong with it may be a part of the password.
        raise ValueError("is no valid URL: percent-encode what is special in a password") from None
    return f"postgresql+psycopg://{rest}"


def _redis_url(url: str | None) -> str | None:
    if url is None:
        return None
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in {"redis", "rediss", "unix"}:
        raise ValueError("must begin with redis://, rediss:// or unix://")
    parts = urlsplit(url)
    try:
        is_clear = scheme == "unix" or (parts.port != 0 and "@" not in parts.path + parts.query + parts.fragment)
    except ValueError:
        is_clear = False
    if not is_clear:
        # What is wrong with it may be a part of the password.
        raise ValueError("is no valid URL: percent-encode what is special in a password")
    if scheme == "unix" and not parts.path:
        raise ValueError("must name a socket: unix:///path/to/socket")
    return url


def _jwks_url(url: str | None) -> str | None:
    if url is None:
        return None
    try:
        parts = urlsplit(url)
        is_clear = bool(parts.hostname) and parts.port != 0 and "@" not in parts.netloc
    except ValueError:
        parts, is_clear = urlsplit(""), False
    if parts.scheme not in {"https", "http"} or not is_clear or parts.fragment or re.search(r"[\x00-\x20\x7f\\]", url):
        raise ValueError("must be an https:// or http:// URL with a host, and without user info and fragment")
    return url


def _bounded(text: str, *, minimum: int, maximum: int) -> int:
    if not (text.isascii() and text.isdecimal()) or not minimum <= int(text) <= maximum:
        raise ValueError(f"must be an integer from {minimum} to {maximum}")
    return int(text)


def _choice(text: str | None, *, choices: tuple[str, ...]) -> str | None:
    if text is not None and text.lower() not in choices:
        raise ValueError(f"must be one of {', '.join(choices)}")
    return text and text.lower()


def _switch(text: str) -> bool:
    if text.lower() not in {"off", "on"}:
        raise ValueError("must be off or on")
    return text.lower() == "on"


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text).expanduser().absolute()


@attrs.frozen
class ListenAddress:
    """Where to listen; port 0 takes a free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> ListenAddress:
        """
        `127.0.0.1:9100`, `localhost:9100`, `[::1]:9100`

        Raises:
            ValueError: It is none of these.
        """
        match = _LISTEN_ADDRESS.fullmatch(text)
        if match is None or int(match["port"]) > PORT_MAX:
            raise ValueError("must be host:port, with an IPv6 address in brackets")
        if match["ipv6"] is not None:
            try:
                IPv6Address(match["ipv6"])
            except ValueError:
                raise ValueError(f"must have an IPv6 address in its brackets, not {match['ipv6']}") from None
        return cls(match["ipv6"] or match["name"], int(match["port"]))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _listen_address(text: str | None) -> ListenAddress | None:
    return None if text is None else ListenAddress.parse(text)


@attrs.frozen
class TokenIssuer:
    """Whose JSON Web Tokens are taken: its name, whom it must make them for, and where its keys are."""

    name: str
    audience: str
    jwks_url: str


@environ.config(prefix=PREFIX, frozen=True)
class Settings:
    """
    The settings of one installation; `Settings.from_env()` reads them.

    Attributes:
        database_url: None: the embedded PostgreSQL under `home`.
        home: None: the platform's user data folder (`home_folder` decides).
        secret_keys: `kid:base64[,kid:base64…]`, 32 bytes each; the first seals, all open.
        egress_allow: CIDRs, or the words `loopback`, `private`.
        egress_ports: The ports allowed on public addresses.
        max_body_bytes: The largest request body, and the largest answer taken from an agent.
        log_format: `console` or `json`; None: console on a terminal, else json.
        redis_url: None: rate limits live in the database.
        shard_groups: 1 on a single PostgreSQL; the shard count where the tables are distributed by organisation.
        jwt_issuer: Whose tokens are taken, by their claim `iss`; None, as the other two: API keys only.
        jwt_audience: What their claim `aud` must hold.
        jwt_jwks_url: Where the issuer publishes its keys.
        policy_dir: None: the packaged Cedar policies alone.
        metrics_address: Where `/metrics` is shown instead of at the API's address; None: there.
        migration_database_url: The owner's connection, for migrations and what spans organisations; None: that of
            `database_url`, which is then one role for everything.
        row_security: The role of `database_url` does not own the tables, and sees the rows of one organisation at a
            time.
    """

    database_url: str | None = environ.var(None, converter=_database_url, help="an external PostgreSQL")
    home: Path | None = environ.var(None, converter=_path, help="where the embedded database and its keys live")
    secret_keys: str | None = environ.var(None, help="kid:base64[,kid:base64…], 32 bytes each")
    egress_allow: str = environ.var("", help="CIDRs, loopback, private")
    egress_ports: str = environ.var("443,8443", help="ports allowed on public addresses")
    max_body_bytes: int = environ.var(
        "1048576",
        converter=partial(_bounded, minimum=MAX_BODY_BYTES_BOUNDS[0], maximum=MAX_BODY_BYTES_BOUNDS[1]),
        help="largest body taken from a caller or an agent",
    )
    log_format: str | None = environ.var(None, converter=partial(_choice, choices=LOG_FORMATS), help="console or json")
    log_level: str = environ.var("info", converter=partial(_choice, choices=LOG_LEVELS), help="debug … critical")
    redis_url: str | None = environ.var(None, converter=_redis_url, help="a Redis that keeps the rate limits")
    shard_groups: int = environ.var(
        "1", converter=partial(_bounded, minimum=1, maximum=SHARD_GROUPS_MAX), help="shards of a distributed database"
    )
    jwt_issuer: str | None = environ.var(None, help="whose JWTs are taken (`iss`)")
    jwt_audience: str | None = environ.var(None, help="whom these JWTs must be for (`aud`)")
    jwt_jwks_url: str | None = environ.var(None, converter=_jwks_url, help="where the issuer's keys are")
    policy_dir: Path | None = environ.var(None, converter=_path, help="a folder of *.cedar files")
    metrics_address: ListenAddress | None = environ.var(
        None, converter=_listen_address, help="host:port where /metrics is shown instead of at the API's address"
    )
    migration_database_url: str | None = environ.var(
        None, converter=_database_url, help="the owner's connection for migrate, when serve uses a lesser role"
    )
    row_security: bool = environ.var("off", converter=_switch, help="off or on: row-level security")

    @classmethod
    def from_env(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """
        Read the environment (the process's by default). An empty variable counts as unset.

        Raises:
            ConfigurationError: Every variable that is wrong, and why.
        """
        given = {name: text for name, text in (os.environ if environment is None else environment).items() if text}
        faults = [fault for field in _fields(cls) if (fault := _fault(cls, field, given))]
        faults += _egress_faults(given.get(variable_of("egress_allow"), ""), EgressPolicy.parse)
        faults += _egress_faults(given.get(variable_of("egress_ports"), ""), partial(EgressPolicy.parse, ""))
        faults += _role_faults(given)
        faults += _jwt_faults({field: given.get(variable_of(field)) for field in JWT_FIELDS})
        if faults:
            raise ConfigurationError("; ".join(faults))
        settings: Settings = environ.to_config(cls, given)
        return settings

    @classmethod
    def unknown_names(cls, environment: Mapping[str, str]) -> list[str]:
        """Variables that begin like ours and mean nothing: misspelt, most likely."""
        known = {variable_of(field) for field in _fields(cls)}
        return sorted(name for name in environment if name.startswith(f"{PREFIX}_") and name not in known)

    def __repr__(self) -> str:
        """Without values: a URL may hold a password, and the keys are secrets."""
        return f"Settings({', '.join(field for field in _fields(type(self)) if getattr(self, field) is not None)})"

    @property
    def egress_policy(self) -> EgressPolicy:
        return EgressPolicy.parse(self.egress_allow, self.egress_ports)

    @property
    def token_issuer(self) -> TokenIssuer | None:
        """
        Raises:
            ConfigurationError: Some of its three settings are missing.
        """
        values = {field: getattr(self, field) for field in JWT_FIELDS}
        if faults := _jwt_faults(values):
            raise ConfigurationError("; ".join(faults))
        return TokenIssuer(*values.values()) if any(values.values()) else None


def variable_of(field: str) -> str:
    """`max_body_bytes` → `EXTERNAL_AGENTS_MAX_BODY_BYTES`"""
    return f"{PREFIX}_{field.upper()}"


def _fields(settings: type[Settings]) -> list[str]:
    as_attrs: Any = settings
    return [field.name for field in attrs.fields(as_attrs)]


def _fault(settings: type[Settings], field: str, given: Mapping[str, str]) -> str | None:
    variable = variable_of(field)
    if variable not in given:
        return None
    try:
        environ.to_config(settings, {variable: given[variable]})
    except ValueError as error:
        return f"{variable} {error}"
    return None


def _role_faults(given: Mapping[str, str]) -> Iterator[str]:
    """The embedded database has one role, which owns the tables."""
    if variable_of("database_url") in given:
        return
    for name in (variable_of("migration_database_url"), variable_of("row_security")):
        if given.get(name, "off").lower() != "off":
            yield f"{name} needs {variable_of('database_url')}, with a role that does not own the tables"


def _egress_faults(words: str, parse: Callable[[str], object]) -> Iterator[str]:
    for word in words.split(","):
        try:
            parse(word)
        except ConfigurationError as error:
            yield str(error).removesuffix(".")


def _jwt_faults(values: Mapping[str, str | None]) -> list[str]:
    missing = [variable_of(field) for field, value in values.items() if not value]
    if len(missing) in {0, len(values)}:
        return []
    return [f"{' and '.join(missing)} must be set, too: JWTs need an issuer, an audience and a URL of keys"]
