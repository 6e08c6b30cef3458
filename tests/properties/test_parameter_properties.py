"""Parameters of lists: whatever comes in, it is read or named."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from external_agents.application.parameters import ParameterReader, cursor_of
from external_agents.domain.errors import ValidationError
from external_agents.domain.ids import created_at_of, first_id_at
from external_agents.testing.builders import make_agent, make_finished_call

AGENT = make_agent()
OFFSETS = st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))
MOMENTS = st.datetimes(datetime(1970, 1, 2), datetime(9999, 12, 30), timezones=OFFSETS)  # noqa: DTZ001
UUID7 = st.tuples(st.integers(0, 2**47), st.integers(0, 2**12 - 1), st.integers(0, 2**62 - 1)).map(
    lambda parts: UUID(int=parts[0] << 80 | 7 << 76 | parts[1] << 64 | 2 << 62 | parts[2])
)


def read(method: str, value: Any, **arguments: Any) -> Any:
    """What the reader makes of a value; "name" if it is a fault of the parameter `name`."""
    reader = ParameterReader({})
    result = getattr(reader, method)("name", value, **arguments)
    try:
        reader.finish()
    except ValidationError as invalid:
        return invalid.errors[0].path
    return result


@given(UUID7.filter(lambda id: id.int >> 80 < 250_000_000_000_000))
def test_a_cursor_leads_back_to_its_invocation(invocation_id: UUID) -> None:
    call = make_finished_call(AGENT, id=invocation_id)
    cursor = cursor_of(call)
    assert read("cursor", cursor) == invocation_id
    assert cursor.replace("-", "").replace("_", "").isalnum()


@given(st.text(max_size=40) | st.text("ABCabc019-_=+/", max_size=30))
def test_no_text_breaks_the_cursor(text: str) -> None:
    result = read("cursor", text)
    assert result == "name" or isinstance(result, UUID)


@given(MOMENTS)
def test_a_moment_is_read_from_its_text_and_from_itself(moment: datetime) -> None:
    assert read("moment", moment) == moment
    assert read("moment", moment.isoformat()) == moment
    assert read("moment", moment).tzinfo is UTC
    if not moment.utcoffset():
        assert read("moment", moment.replace(tzinfo=None).isoformat() + "Z") == moment
    assert read("moment", moment.replace(tzinfo=None)) == "name"
    assert read("moment", moment.replace(tzinfo=None).isoformat()) == "name"


@given(st.text(max_size=40) | st.from_regex(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]{5,15}(Z|[+-][0-9:]{2,6})?"))
def test_no_text_breaks_the_moment(text: str) -> None:
    result = read("moment", text)
    assert result == "name" or result.tzinfo is UTC


@given(st.integers() | st.text(max_size=12) | st.integers(-5, 105).map(str))
def test_a_whole_number_is_within_its_bounds(value: int | str) -> None:
    result = read("whole", value, maximum=100)
    assert result == "name" or (1 <= result <= 100 and str(result) == str(value).lstrip("0"))


@given(MOMENTS, UUID7.filter(lambda id: id.int >> 80 < 250_000_000_000_000))
def test_the_first_id_of_a_moment_divides_the_ids(moment: datetime, other: UUID) -> None:
    first = first_id_at(moment)
    assert first.version == 7
    assert (other >= first) == (created_at_of(other) >= moment)
