"""
Arrays as parameters, packed in PostgreSQL's binary format.

psycopg's own dumping of lists looks at every element for its type; here the type is known. It is worth 5 % of the
service's rate as compared with psycopg's binary lists, and a quarter as compared with text.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from struct import pack
from typing import Any, ClassVar
from uuid import UUID

import psycopg
from psycopg.adapt import Dumper
from psycopg.pq import Format

_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_DAY_ZERO = date(2000, 1, 1)
_MICROSECOND = timedelta(microseconds=1)
_NULL = b"\xff\xff\xff\xff"


class Texts(list[str | None]):
    """text[]"""


class Uuids(list[UUID]):
    """uuid[]"""


class Shorts(list[int]):
    """smallint[]"""


class Integers(list[int | None]):
    """integer[]"""


class Booleans(list[bool]):
    """boolean[]"""


class Dates(list[date]):
    """date[]"""


class Moments(list[datetime | None]):
    """timestamptz[]"""


class Bytes(list[bytes | None]):
    """bytea[]"""


class _ArrayDumper(Dumper):
    format = Format.BINARY
    element_oid: ClassVar[int]

    def dump(self, obj: Sequence[Any]) -> bytes:
        """`ndim`, `has nulls`, the elements' type, length and lower bound; then each with its length before it."""
        if not obj:
            return pack(">iii", 0, 0, self.element_oid)
        body = self.elements(obj)
        return pack(">iiiii", 1, 1 if None in obj else 0, self.element_oid, len(obj), 1) + body

    def elements(self, values: Sequence[Any]) -> bytes:
        raise NotImplementedError


class _VariableDumper(_ArrayDumper):
    def elements(self, values: Sequence[Any]) -> bytes:
        parts: list[bytes] = []
        for value in values:
            if value is None:
                parts.append(_NULL)
            else:
                parts.append(len(value).to_bytes(4, "big"))
                parts.append(value)
        return b"".join(parts)


class _BytesDumper(_VariableDumper):
    oid, element_oid = 1001, 17


class _TextsDumper(_VariableDumper):
    oid, element_oid = 1009, 25

    def elements(self, values: Sequence[Any]) -> bytes:
        return super().elements([None if value is None else value.encode() for value in values])


class _UuidsDumper(_ArrayDumper):
    oid, element_oid = 2951, 2950

    def elements(self, values: Sequence[Any]) -> bytes:
        return b"".join([b"\0\0\0\x10" + value.bytes for value in values])


class _FixedDumper(_ArrayDumper):
    """Numbers of one width."""

    code: ClassVar[str]
    width: ClassVar[int]

    def elements(self, values: Sequence[Any]) -> bytes:
        if None not in values:
            interleaved = [part for value in values for part in (self.width, self.number(value))]
            return pack(f">{f'i{self.code}' * len(values)}", *interleaved)
        one = f">i{self.code}"
        return b"".join([_NULL if value is None else pack(one, self.width, self.number(value)) for value in values])

    def number(self, value: Any) -> Any:
        return value


class _ShortsDumper(_FixedDumper):
    oid, element_oid, code, width = 1005, 21, "h", 2


class _IntegersDumper(_FixedDumper):
    oid, element_oid, code, width = 1007, 23, "i", 4


class _BooleansDumper(_FixedDumper):
    oid, element_oid, code, width = 1000, 16, "?", 1


class _DatesDumper(_FixedDumper):
    oid, element_oid, code, width = 1182, 1082, "i", 4

    def number(self, value: date) -> int:
        return (value - _DAY_ZERO).days


class _MomentsDumper(_FixedDumper):
    oid, element_oid, code, width = 1185, 1184, "q", 8

    def number(self, value: datetime) -> int:
        return (value - _EPOCH) // _MICROSECOND


_DUMPERS: dict[type[list[Any]], type[_ArrayDumper]] = {
    Texts: _TextsDumper,
    Uuids: _UuidsDumper,
    Shorts: _ShortsDumper,
    Integers: _IntegersDumper,
    Booleans: _BooleansDumper,
    Dates: _DatesDumper,
    Moments: _MomentsDumper,
    Bytes: _BytesDumper,
}


def register_arrays(connection: psycopg.AsyncConnection[Any]) -> None:
    for kind, dumper in _DUMPERS.items():
        connection.adapters.register_dumper(kind, dumper)
