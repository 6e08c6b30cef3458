"""What a token claims (RFC 7519, section 4), once its signature holds: for whom it stands, and whether it is for us."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import attrs

from external_agents.domain.access import Principal
from external_agents.domain.json_values import JsonValue

LEEWAY_S = 60.0
"""How far the issuer's clock may be off."""

NO_ATTRIBUTES = frozenset({"iss", "sub", "aud", "exp", "nbf", "iat", "jti", "org_id", "permissions"})
"""RFC 7519's registered claims, which are about the token or in another place, and those that are used by name."""

Claims = Mapping[str, JsonValue]


class TokenRefused(Exception):
    """Why, for the operator's log: fixed words, nothing of the token."""


@attrs.frozen
class Admitted:
    """
    Attributes:
        until: When the token has expired for good, in seconds since 1970.
    """

    principal: Principal
    until: float


def admit(claims: Claims, *, issuer: str, audience: str, now: float) -> Admitted:
    """
    Args:
        claims: As `plain_value` leaves them: numbers are in the range of a double, text has a UTF-8 form.
        now: In seconds since 1970.

    Raises:
        TokenRefused: It is not from this issuer, not for this audience, not valid now, or lacks what is needed.
    """
    if claims.get("iss") != issuer:
        raise TokenRefused("iss is not the issuer")
    if audience not in _audiences(claims.get("aud")):
        raise TokenRefused("aud does not hold the audience")
    expires = _numeric_date(claims, "exp")
    if expires is None:
        raise TokenRefused("there is no exp")
    if now >= expires + LEEWAY_S:
        raise TokenRefused("it has expired")
    for name in ("nbf", "iat"):
        begins = _numeric_date(claims, name)
        if begins is not None and now < begins - LEEWAY_S:
            raise TokenRefused(f"{name} lies in the future")
    return Admitted(_principal(claims), expires + LEEWAY_S)


def _principal(claims: Claims) -> Principal:
    attributes = {name: value for name, value in claims.items() if isinstance(value, str) and name not in NO_ATTRIBUTES}
    org_id, subject = _text(claims, "org_id"), _text(claims, "sub")
    try:
        return Principal(org_id, subject, _permissions(claims), attributes)
    except ValueError as error:
        # It says which rule is broken, in terms of the principal, and nothing of the value.
        raise TokenRefused(str(error)) from None


def _audiences(aud: JsonValue) -> list[str]:
    """RFC 7519, section 4.1.3: one string, or a list of them."""
    audiences = [aud] if isinstance(aud, str) else aud
    if not isinstance(audiences, list) or not all(isinstance(audience, str) for audience in audiences):
        raise TokenRefused("aud is neither a string nor a list of strings")
    return audiences


def _permissions(claims: Claims) -> list[str]:
    permissions = claims.get("permissions", [])
    if not isinstance(permissions, list) or not all(isinstance(permission, str) for permission in permissions):
        raise TokenRefused("permissions is no list of strings")
    return permissions


def _text(claims: Claims, name: str) -> str:
    text = claims.get(name)
    if not isinstance(text, str):
        raise TokenRefused(f"there is no {name}, or it is no string")
    return text


def _numeric_date(claims: Claims, name: str) -> float | None:
    """Seconds since 1970, or None where there is none (RFC 7519, section 2)."""
    if name not in claims:
        return None
    value: Any = claims[name]
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise TokenRefused(f"{name} is no number")
    return float(value)
