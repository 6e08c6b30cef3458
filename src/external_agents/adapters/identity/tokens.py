"""
How an API key is written: `eak_<id>_<secret><checksum>`, letters, digits and underscores only.

So it is one word to a double click, a shell, a header (token68, RFC 9110) and a secret scanner. The checksum tells a
mistyped or cut key from an unknown one without asking any store; it proves nothing.
"""

from __future__ import annotations

import re
import secrets
import string
import zlib
from uuid import UUID

import attrs

PREFIX = "eak"
SECRET_LENGTH = 43
"""62^43 > 2^256."""

_DIGITS = string.digits + string.ascii_uppercase + string.ascii_lowercase
_VALUES = {digit: value for value, digit in enumerate(_DIGITS)}
_ID_LENGTH = 22
_CHECKSUM_LENGTH = 6
_FORM = re.compile(
    rf"({PREFIX}_([0-9A-Za-z]{{{_ID_LENGTH}}})_[0-9A-Za-z]{{{SECRET_LENGTH}}})([0-9A-Za-z]{{{_CHECKSUM_LENGTH}}})"
)


@attrs.frozen
class ApiKeyToken:
    """
    Attributes:
        text: The whole key, as its holder presents it.
    """

    key_id: UUID
    text: str = attrs.field(repr=False)

    @classmethod
    def new(cls, key_id: UUID) -> ApiKeyToken:
        secret = "".join(secrets.choice(_DIGITS) for _ in range(SECRET_LENGTH))
        body = f"{PREFIX}_{_base62(key_id.int, _ID_LENGTH)}_{secret}"
        return cls(key_id, body + checksum_of(body))

    @classmethod
    def parse(cls, text: str) -> ApiKeyToken | None:
        """None: this never was an API key of this service."""
        form = _FORM.fullmatch(text)
        if form is None or form[3] != checksum_of(form[1]):
            return None
        number = 0
        for digit in form[2]:
            number = number * 62 + _VALUES[digit]
        return cls(UUID(int=number), text) if number < 1 << 128 else None


def checksum_of(body: str) -> str:
    return _base62(zlib.crc32(body.encode("ascii")), _CHECKSUM_LENGTH)


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_DIGITS[digit])
    return "".join(reversed(digits))
