"""Which payloads are the same, and which are not."""

from __future__ import annotations

from itertools import combinations

import pytest

from external_agents.domain.idempotency import fingerprint
from external_agents.domain.json_values import JsonText

SAME = [
    ["1", "1.0", "1e0", "10E-1", "0.1e1", "1e+0", "1e-00", "0.001E+3", " 1\n"],
    ["0", "-0", "0.0", "-0.0e7", "0e99999999999999999999", "0E-5"],
    ["-12.50", "-125e-1", "-0.125E2"],
    ["100", "1e2", "0.1e3"],
    ["12345678901234567890123", "1234567890123456789012.3e1"],
    ["1e999999999", "10e999999998", "0.1e1000000000"],
    ["1e-99999999999999999999999", "10e-100000000000000000000000"],
    ['"\\ud800\\udc00"', '"\U00010000"', '"\\uD800\\uDC00"'],
    ['"a/\\n"', '"\\u0061\\/\\u000A"'],
    ['{"a":1,"b":[1, 2]}', '{ "b":[1.0,2],\t"a":1e0}', '{"\\u0061":1,"b":[1,2]}', '{"a":0,"b":[],"a":1,"b":[1,2]}'],
    ["[]", "[ ]"],
    ["{}", "{\n}"],
]
OTHERS = [
    *(
        '"1"',
        '"1e0"',
        '"\\ud8001e0"',
        '"\\ud800\\udc001e0"',
        "[1]",
        '{"1":1}',
        "1e1",
        "-1",
        "1.0000000000000000000000001",
    ),
    *('"\\ud800"', '"\\udc00"', '"\\udc00\\ud800"', '"\\u0000"', '""', "null", '"null"', "true", "false", '"true"'),
    *("[[]]", "[{}]", "[1,2]", "[12]", '["1,2"]', '["1",2]', "[2,1]", "[[1],2]", "[1,[2]]", '{"a":[1,2]}', '{"a":1}'),
    *('{"a":1,"b":[2, 1]}', '{"a":[1, 2],"b":1}', '{"a":null}', '{"A":1}', '{"a":{"a":1}}', "12345678901234567890124"),
    *("1e400", "1e401", "1e-400", "-1e400", "1e99999999999999999999999", '"a\\n"', '"\u00e9"', '"e\u0301"'),
]


def print_of(text: str) -> bytes:
    return fingerprint(JsonText.parse(text.encode()))


@pytest.mark.parametrize("texts", SAME, ids=lambda texts: texts[0])
def test_equal_json(texts: list[str]) -> None:
    assert len({print_of(text) for text in texts}) == 1


def test_other_json() -> None:
    prints = [(text, print_of(text)) for text in [*(texts[0] for texts in SAME), *OTHERS]]
    assert [(first, second) for (first, one), (second, other) in combinations(prints, 2) if one == other] == []


def test_a_python_value_and_its_text() -> None:
    assert fingerprint(JsonText.of({"b": [1, 2.5], "a": "\ud800"})) == print_of('{"a": "\\ud800", "b": [1.0, 25e-1]}')
