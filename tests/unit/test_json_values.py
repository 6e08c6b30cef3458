"""JSON from outside: what is kept without loss, and what is refused by name."""

from __future__ import annotations

import json
import tracemalloc
from decimal import Decimal
from typing import Any

import pytest

from external_agents.domain.errors import FAULTS_MAX, Fault, MalformedJson, ValidationError
from external_agents.domain.json_values import JsonText, decode, dumps, join_path, merge_patch, plain_value

MEGABYTE = 1 << 20


def faults_of(value: Any) -> tuple[Fault, ...]:
    with pytest.raises(ValidationError) as raised:
        plain_value(value)
    return raised.value.errors


class TestJsonText:
    @pytest.mark.parametrize(
        "raw",
        [
            b"null",
            b' {"a" : 1.50e+2, "a":2} ',
            b"12345678901234567890123.000",
            b'"\\u0000 \\ud800 \\ud83d\\ude00"',
            b"1" * 10_000,
            b"-0",
            b"1e999999999999999999999",
            "[\u00fc\u2028\U0001f600]".encode().replace(b"[", b'["').replace(b"]", b'"]'),
            b"[" * 512 + b"]" * 512,
            b'{"a":' * 512 + b"1" + b"}" * 512,
            b"[" + b'"' + b"[{" * 5000 + b'"' + b"]",
        ],
        ids=lambda raw: repr(raw[:20]),
    )
    def test_json_is_kept_to_the_byte(self, raw: bytes) -> None:
        assert JsonText.parse(raw).text.encode() == raw

    @pytest.mark.parametrize(
        "raw",
        [
            b"",
            b" ",
            b"{",
            b"nul",
            b"NaN",
            b"Infinity",
            b"[-Infinity]",
            b"{'a':1}",
            b'{"a":1,}',
            b"[1,]",
            b"01",
            b"1.",
            b"+1",
            b"1 2",
            b'"\x01"',
            b'"\\x"',
            b'"\xff"',
            b'"\xed\xa0\x80"',
            b"\xef\xbb\xbf1",
            "1".encode("utf-16"),
            b"[" * 513 + b"]" * 513,
            b"[" * 100_000,
            b'{"a":' * 513 + b"1" + b"}" * 513,
        ],
        ids=lambda raw: repr(raw[:20]),
    )
    def test_anything_else_is_malformed(self, raw: bytes) -> None:
        with pytest.raises(MalformedJson):
            JsonText.parse(raw)
        if not raw.startswith(b"1e"):
            with pytest.raises(MalformedJson):
                decode(raw)

    @pytest.mark.parametrize(
        "raw",
        [
            b"[" * 600 + b'"' + b'\\"' * (MEGABYTE // 2),
            b"[" * 600 + b'"' + b'\\"' * (MEGABYTE // 2) + b"\\",
            b"[" * 600 + b'"' * MEGABYTE,
            b"[" * 600 + b"\\" * MEGABYTE,
            b"[]" * (MEGABYTE // 2),
            b"1" * MEGABYTE,
            b"0." + b"1" * MEGABYTE,
        ],
        ids=lambda raw: repr(raw[-8:]),
    )
    def test_hostile_text_takes_no_more_than_linear_time(self, raw: bytes) -> None:
        """Each of these takes minutes where a step is quadratic."""
        for read in (JsonText.parse, decode):
            try:
                read(raw)
            except MalformedJson:
                continue

    def test_the_text_is_not_in_its_repr(self) -> None:
        assert "secret" not in repr(JsonText.parse(b'"secret"'))

    @pytest.mark.parametrize(
        ("text", "value", "exact"),
        [
            ("12345678901234567890123", 12345678901234567890123, 12345678901234567890123),
            ("0.1", 0.1, Decimal("0.1")),
            ("1E2", 100.0, Decimal("1E2")),
            ("1" * 401, float("inf"), None),
            ("1e-99999999999999999999", 0.0, None),
        ],
    )
    def test_numbers_for_python(self, text: str, value: Any, exact: Any) -> None:
        assert JsonText(text).value == value
        assert JsonText(text).exact() == exact

    def test_of_a_value(self) -> None:
        assert JsonText.of({"a": [1, 0.5, Decimal("0.10"), None, True, "ü\ud800"]}).value == {
            "a": [1, 0.5, 0.1, None, True, "ü\ud800"]
        }
        looped: list[Any] = []
        looped.append(looped)
        deep: Any = None
        for _ in range(513):
            deep = [deep]
        for wrong in (float("nan"), Decimal("Infinity"), {1: 2}, object(), {1, 2}, b"x", looped, deep, 10**5000):
            with pytest.raises(ValidationError):
                JsonText.of(wrong)


class TestPlainValue:
    @pytest.mark.parametrize(
        ("raw", "faults"),
        [
            (b'{"a":"\\u0000"}', {"a": "contains NUL, which cannot be stored"}),
            (b'{"a":["x","\\ud800"]}', {"a[1]": "contains a lone surrogate, which has no UTF-8 form"}),
            (b'{"a":1e400}', {"a": "is not a finite number in the range of a double"}),
            (b'{"a":-1e400}', {"a": "is not a finite number in the range of a double"}),
            (b'{"a":1e-400}', {"a": "is a number too small for a double"}),
            (b'{"a":1e99999999999999999999}', {"a": "is not a finite number in the range of a double"}),
            (b'{"a":1e-99999999999999999999}', {"a": "is not a finite number in the range of a double"}),
            (b'{"a":1' + b"0" * 400 + b"}", {"a": "is not a finite number in the range of a double"}),
            (b'{"a":1' + b"0" * 309 + b"}", {"a": "is a number beyond the range of a double"}),
            (b'{"a":0.' + b"1" * 500 + b"}", {"a": "is a number of over 400 digits"}),
            (b'{"a":{"b":1,"b":1,"c":2}}', {"a.b": "is given more than once"}),
            (b'[{"b":1,"b":1}]', {"[0].b": "is given more than once"}),
            (b"[" * 65 + b"]" * 65, {"": "nests over 64 levels"}),
            (b'{"a":' * 65 + b"1" + b"}" * 65, {"": "nests over 64 levels"}),
            (
                b'{"\\u0000":1,"\\ud800":1}',
                {
                    "\\u0000": "has a name that contains NUL, which cannot be stored",
                    "\\ud800": "has a name that contains a lone surrogate, which has no UTF-8 form",
                },
            ),
        ],
        ids=lambda value: repr(value)[:30],
    )
    def test_what_cannot_be_stored_is_named(self, raw: bytes, faults: dict[str, str]) -> None:
        assert {fault.path: fault.message for fault in faults_of(decode(raw))} == faults

    @pytest.mark.parametrize(
        "value", [float("nan"), float("inf"), Decimal("NaN"), Decimal("sNaN"), object(), {1}, b"x"]
    )
    def test_python_values_without_a_json_form(self, value: Any) -> None:
        assert [fault.path for fault in faults_of({"a": [value]})] == ["a[0]"]
        assert [fault.path for fault in faults_of({"a": {5: 1}})] == ["a"]

    def test_all_faults_at_once(self) -> None:
        value = decode(b'{"a":"\\u0000","b":[1e999,{"c":1,"c":2}],"d":"\\ud800\\u0000"}')
        assert [fault.path for fault in faults_of(value)] == ["a", "b[0]", "b[1].c", "d", "d"]

    def test_sixty_four_levels_are_fine(self) -> None:
        value = decode(b"[" * 64 + b"]" * 64)
        assert plain_value(value) == value

    def test_floats_become_exact(self) -> None:
        assert plain_value({"a": 0.1, "b": (1, True, None)}) == {"a": Decimal("0.1"), "b": [1, True, None]}

    def test_paths_and_faults_are_bounded(self) -> None:
        """An answer that repeats a long path for every fault would be gigabytes."""
        many = {"A" * 100_000: {"B" * 100_000: [["\0"] * 50_000]}}
        faults = faults_of(many)
        assert len(faults) <= FAULTS_MAX
        assert max(len(fault.path) for fault in faults) < 700
        deep: Any = "\0"
        for _ in range(60):
            deep = {"C" * 100: deep}
        assert len(faults_of(deep)[0].path) < 700

    def test_the_memory_for_faults_is_bounded(self) -> None:
        """Of a hundred thousand faults with long paths a thousand are kept, not all of them until the end."""
        many: Any = ["\0"] * 100_000
        for _ in range(5):
            many = {"A" * 100: many}
        tracemalloc.start()
        try:
            faults_of(many)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak_bytes < 10 * MEGABYTE


class TestDumps:
    @pytest.mark.parametrize(
        "text", ["1.50", "1E+400", "12345678901234567890123.10", '{"b":1,"a":[2,{}]}', '"ü\\n"', "[]", "-0", "true"]
    )
    def test_what_was_decoded_is_written_with_its_digits(self, text: str) -> None:
        value = json.loads(text, parse_float=Decimal)
        assert dumps(value) == text.replace("-0", "0")

    def test_no_member_is_named_by_a_number(self) -> None:
        with pytest.raises(TypeError):
            dumps({1: 2})


class TestMergePatch:
    @pytest.mark.parametrize(
        ("target", "patch", "result"),
        [
            ({"a": "b"}, {"a": "c"}, {"a": "c"}),
            ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
            ({"a": "b"}, {"a": None}, {}),
            ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
            ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
            ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
            ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
            ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
            (["a", "b"], ["c", "d"], ["c", "d"]),
            ({"a": "b"}, ["c"], ["c"]),
            ({"a": "foo"}, None, None),
            ({"a": "foo"}, "bar", "bar"),
            ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
            ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
            ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
        ],
    )
    def test_the_examples_of_rfc_7396(self, target: Any, patch: Any, result: Any) -> None:
        before = json.dumps(target)
        assert merge_patch(target, patch) == result
        assert json.dumps(target) == before


def test_paths() -> None:
    assert join_path(join_path(join_path("", "tags"), 2), "x") == "tags[2].x"
