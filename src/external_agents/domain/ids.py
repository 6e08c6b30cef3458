"""The time within a UUIDv7 (RFC 9562, section 5.7): its first 48 bits are milliseconds since the epoch."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_VERSION_AND_VARIANT = (7 << 76) | (2 << 62)


def created_at_of(id: UUID) -> datetime:
    """
    The millisecond in which a UUIDv7 was made, in UTC.

    Raises:
        OverflowError: It lies after the year 9999.
    """
    return _EPOCH + (id.int >> 80) * _MILLISECOND


def first_id_at(moment: datetime) -> UUID:
    """
    The smallest UUIDv7 whose `created_at_of` is not before `moment`, an aware time; before 1970 it is that of 1970.

    So `id >= first_id_at(since)` is `created_at >= since`, and `id < first_id_at(until)` is `created_at < until`.
    """
    milliseconds = max(0, -((_EPOCH - moment) // _MILLISECOND))
    return UUID(int=milliseconds << 80 | _VERSION_AND_VARIANT)
