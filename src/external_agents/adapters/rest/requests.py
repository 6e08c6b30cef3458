"""Reading what resources need from a request."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from uuid import UUID

import attrs
from falcon.asgi import Request

from external_agents.adapters.rest.incoming import incoming_of
from external_agents.domain.errors import ValidationError
from external_agents.domain.json_values import JsonText, JsonValue, decode

_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE | re.ASCII)
_NOTHING = UUID(int=0)
_uuid = lru_cache(maxsize=4096)(UUID)

_HEADERS: Mapping[str, str] = {"idempotency_key": "Idempotency-Key"}

_TAG = r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"'
_ENTITY_TAGS = re.compile(rf"[ \t,]*{_TAG}(?:[ \t]*,[ \t,]*{_TAG})*[ \t,]*")
_ENTITY_TAG = re.compile(r'(?P<weak>W/)?"(?P<tag>[^"]*)"')
_VERSION = re.compile(r"[1-9][0-9]{0,17}")


def id_of(text: str) -> UUID:
    """The id in a path. What is no id names nothing, as the nil UUID does, and is answered like an unknown one."""
    return _uuid(text) if _UUID.fullmatch(text) else _NOTHING


async def document_of(req: Request) -> JsonValue:
    """
    The body as a document of fields.

    Raises:
        falcon.HTTPError: It is too large, or of another type.
        MalformedJson: It is not JSON.
    """
    return decode(await incoming_of(req).body.read())


async def payload_of(req: Request) -> JsonText:
    """The body as it came, known to be JSON. Raises as `document_of` does."""
    return JsonText.parse(await incoming_of(req).body.read())


def lineage_hop_id_of(req: Request) -> str | None:
    return _text(b", ".join(incoming_of(req).fields.get(b"x-lineage-hop-id", ()))) or None


def idempotency_key_of(req: Request) -> str | None:
    """The key; None where none is sent, and empty, which is no key, where there are several."""
    values = incoming_of(req).fields.get(b"idempotency-key")
    if not values:
        return None
    return _text(values[0]).strip(" \t") if len(values) == 1 else ""


def with_header_names(invalid: ValidationError) -> ValidationError:
    """The faults of values that came in header fields, by the fields' names."""
    return ValidationError(attrs.evolve(fault, path=_HEADERS.get(fault.path, fault.path)) for fault in invalid.errors)


def has_version(req: Request, version: int) -> bool:
    """Whether If-None-Match names this version (RFC 9110, section 13.1.2; weak comparison)."""
    field = _combined(req, b"if-none-match")
    if field is None or not _ENTITY_TAGS.fullmatch(field):
        return field == "*"
    return any(match["tag"] == str(version) for match in _ENTITY_TAG.finditer(field))


def demanded_versions(req: Request) -> frozenset[int] | None:
    """
    The versions that If-Match names (RFC 9110, section 13.1.1; strong comparison); None where any will do.

    What is no list of entity tags names no version, and so none matches.
    """
    field = _combined(req, b"if-match")
    if field is None or field == "*":
        return None
    if not _ENTITY_TAGS.fullmatch(field):
        return frozenset()
    tags = (match["tag"] for match in _ENTITY_TAG.finditer(field) if not match["weak"])
    return frozenset(int(tag) for tag in tags if _VERSION.fullmatch(tag))


def _combined(req: Request, name: bytes) -> str | None:
    values = incoming_of(req).fields.get(name)
    return b",".join(values).decode("latin-1").strip() if values else None


def _text(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value.decode("latin-1")
