"""`external-agents keys …`"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Annotated

import typer

from external_agents.cli.context import JsonOption, OrgOption, parse_id, with_installation
from external_agents.cli.output import note, show_json, show_table
from external_agents.cli.rewrap import rewrap
from external_agents.domain.access import PERMISSIONS
from external_agents.domain.errors import NotFound
from external_agents.domain.json_values import JsonValue
from external_agents.ports.identity import ApiKey

app = typer.Typer(help="API keys: make, list, revoke. Secret keys: rewrap.", no_args_is_help=True)

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_DURATION = re.compile(r"(0*[1-9]\d{0,8})([smhd])", re.ASCII)


class KeyNotFound(NotFound):
    """No API key has this id."""

    what = "API key"


@app.command("create")
def create(
    org: OrgOption,
    subject: Annotated[str, typer.Option(help="Whom it stands for; recorded with all they do.", show_default=False)],
    permission: Annotated[
        list[str] | None, typer.Option(metavar="P", help="Such as invoke:external_agent; repeat it. None: all.")
    ] = None,
    attribute: Annotated[
        list[str] | None, typer.Option(metavar="K=V", help="What policies see as a tag of the subject; repeat it.")
    ] = None,
    expires_in: Annotated[
        str | None, typer.Option(metavar="90d", help="A number and s, m, h or d. None: never.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """
    Make an API key and print it, once.

    Example: external-agents keys create --org acme --subject ci --permission invoke:external_agent --expires-in 90d
    """
    if unknown := set(permission or ()).difference(PERMISSIONS):
        known = ", ".join(PERMISSIONS)
        raise typer.BadParameter(f"{', '.join(sorted(unknown))} is none of {known}", param_hint="--permission")
    attributes, lifetime = _attributes(attribute or []), _duration(expires_in)
    text, key = with_installation(
        lambda installation: installation.api_keys.issue(org, subject, permission or None, attributes, lifetime)
    )
    if as_json:
        show_json({"id": str(key.id), "key": text, **_described(key)})
    else:
        note(f"API key {key.id} of {org}, shown this once:")
        print(text)


@app.command("list")
def list_keys(org: OrgOption, as_json: JsonOption = False) -> None:
    """
    The keys of an organisation, newest first, revoked and expired ones too. The keys themselves are not kept.

    When a key was last used is known by the hour (UTC), some seconds after its first use in it.

    Example: external-agents keys list --org acme
    """
    keys = with_installation(lambda installation: installation.api_keys.list(org))
    if as_json:
        show_json({"items": [_listed(key) for key in keys]})
        return
    show_table(
        ("id", "subject", "permissions", "expires", "revoked", "used"),
        [
            (
                str(key.id),
                key.principal.subject,
                " ".join(sorted(key.principal.permissions)),
                _moment(key.expires_at) or "never",
                _moment(key.revoked_at) or "",
                _moment(key.last_used_at) or "",
            )
            for key in keys
        ],
    )


@app.command("revoke")
def revoke(key_id: Annotated[str, typer.Argument(metavar="ID", show_default=False)]) -> None:
    """
    Refuse a key from now on, in every process within 2 s.

    Example: external-agents keys revoke 019aa0f2-…
    """
    wanted = parse_id(key_id, "ID")
    if not with_installation(lambda installation: installation.api_keys.revoke(wanted)):
        raise KeyNotFound
    note(f"API key {wanted} is revoked.")


app.command("rewrap")(rewrap)


def _described(key: ApiKey) -> dict[str, JsonValue]:
    return {
        "org_id": key.principal.org_id,
        "subject": key.principal.subject,
        "permissions": sorted(key.principal.permissions),
        "attributes": dict(key.principal.attributes),
        "expires_at": _moment(key.expires_at),
    }


def _listed(key: ApiKey) -> dict[str, JsonValue]:
    moments = {"revoked_at": _moment(key.revoked_at), "last_used_at": _moment(key.last_used_at)}
    return {"id": str(key.id), **_described(key), **moments}


def _moment(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _attributes(pairs: list[str]) -> dict[str, str]:
    attributes = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or name in attributes:
            raise typer.BadParameter(f"{pair!r} is not NAME=VALUE with a name of its own", param_hint="--attribute")
        attributes[name] = value
    return attributes


def _duration(text: str | None) -> timedelta | None:
    if text is None:
        return None
    match = _DURATION.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no number with s, m, h or d behind it", param_hint="--expires-in")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})
