"""Raw bytes at the real server: whatever comes, no failure of ours, no traceback, and every worker lives on."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote_from_bytes

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wire import Operation, Wire

pytestmark = pytest.mark.xdist_group("fuzz")

HEALTH = (HealthCheck.too_slow, HealthCheck.function_scoped_fixture)
_usual = settings.default.max_examples  # type: ignore[union-attr]
fuzzed = settings(max_examples=4 * _usual, derandomize=_usual <= 100, suppress_health_check=HEALTH)
"""The usual run is the same every time; a thorough one looks elsewhere each time."""

METHODS = ("GET", "POST", "PATCH", "DELETE", "HEAD", "OPTIONS", "PUT", "TRACE", "CONNECT", "PRI", "get", "", "G\x00T")
FIELD_NAMES = (
    *(b"Authorization", b"Content-Type", b"Content-Length", b"Content-Encoding", b"Transfer-Encoding", b"Connection"),
    *(
        b"Expect",
        b"Upgrade",
        b"Host",
        b"If-Match",
        b"If-None-Match",
        b"Idempotency-Key",
        b"X-Lineage-Hop-Id",
        b"Prefer",
    ),
    *(b"traceparent", b"X-Request-Id", b"Accept", b"Cookie", b"Forwarded", b"X-Forwarded-For", b"Range", b"TE"),
)
FIELD_VALUES = (
    *(
        b"",
        b"chunked",
        b"gzip, chunked",
        b"0",
        b"-1",
        b"+5",
        b"5, 5",
        b"99999999999999999999",
        b"100-continue",
        b"close",
    ),
    *(b"keep-alive, Upgrade", b"websocket", b"h2c", b"application/json", b"application/json; charset=utf-16", b"*"),
    *(
        b'"1"',
        b'W/"1", "',
        b"respond-async, wait=5",
        b"wait=-1",
        b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01",
        b"bytes=0-",
    ),
)

pieces = st.binary(max_size=60)
field_text = st.one_of(st.sampled_from(FIELD_VALUES), pieces, st.text(max_size=300).map(str.encode))
"""May hold line ends, which begin new fields or end the head."""


@st.composite
def fields(draw: st.DrawFn, value: st.SearchStrategy[bytes] = field_text) -> bytes:
    name = draw(st.one_of(st.sampled_from(FIELD_NAMES), pieces))
    return name + draw(st.sampled_from([b": ", b":", b" : ", b"\t:", b""])) + draw(value)


@st.composite
def chunked(draw: st.DrawFn) -> bytes:
    """A chunked body, most often broken."""
    body = b""
    for chunk in draw(st.lists(pieces, max_size=4)):
        size = draw(
            st.sampled_from([b"%x" % len(chunk), b"%X;a=b" % len(chunk), b"-1", b"ffffffffffffffffff", b"", b"zz"])
        )
        body += size + draw(st.sampled_from([b"\r\n", b"\n", b""])) + chunk + b"\r\n"
    return body + draw(st.sampled_from([b"0\r\n\r\n", b"0\r\nTrailer: x\r\n\r\n", b"0\r\n" + b"a" * 100, b""]))


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """Something like a request: any part of it may be wrong."""
    method = draw(st.sampled_from(METHODS)).encode()
    target = draw(st.one_of(st.sampled_from([b"/api/external-agents", b"*", b"//", b"http://[/", b"/%"]), pieces))
    version = draw(
        st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/1.", b"HTTP/9999999999.1", b"ICY", b""])
    )
    end = draw(st.sampled_from([b"\r\n", b"\n", b"\r"]))
    head = [method + b" " + target + b" " + version, *draw(st.lists(fields(), max_size=6))]
    return end.join([*head, b"", draw(st.one_of(pieces, chunked()))])


def damaged(whole: bytes, data: st.DataObject) -> bytes:
    """A good request with a few bytes taken out, put in, or doubled."""
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, len(whole)))
        end = min(len(whole), begin + data.draw(st.integers(0, 8)))
        whole = whole[:begin] + data.draw(st.one_of(pieces, st.just(whole[begin:end] * 2))) + whole[end:]
    return whole


@fuzzed
@given(st.one_of(st.binary(max_size=2000), messages(), st.lists(messages(), max_size=3).map(b"".join)))
def test_bytes_that_may_be_no_request(wire: Wire, request_bytes: bytes) -> None:
    wire.judged(request_bytes)


@fuzzed
@given(st.data())
def test_requests_with_a_few_bytes_off(wire: Wire, data: st.DataObject) -> None:
    operation = data.draw(st.sampled_from(wire.operations))
    body = json.dumps(data.draw(st.sampled_from(operation.examples))).encode() if operation.examples else b""
    framing = data.draw(st.sampled_from([(), (b"Transfer-Encoding: chunked",), (b"Content-Length: 3",)]))
    target = known(wire, operation).encode()
    whole = wire.request(operation.method, target, b"Content-Type: application/json", *framing, body=body)
    wire.judged(damaged(whole, data))


HOSTILE_TEXT = (
    "",
    "\x00",
    "\ud800",
    "\udfff\ud800",
    "\u202e",
    "a" * 3000,
    "{{7*7}}",
    "%s%n",
    "../../etc/passwd",
    "'; --",
)
HOSTILE_NUMBERS = (0, -1, 10**400, -(10**30), 1e308, 5e-324, float("nan"), float("inf"), 0.1 + 0.2)

json_values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.sampled_from(HOSTILE_TEXT),
        st.sampled_from(HOSTILE_NUMBERS),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=10), inner, max_size=4)),
    max_leaves=12,
)  # fmt: skip


hostile_text = st.one_of(st.sampled_from(HOSTILE_TEXT), st.text())
hostile_numbers = st.one_of(st.sampled_from(HOSTILE_NUMBERS), st.integers(), st.floats())


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """A document with one place of it replaced, removed or added; most often by something of the same type."""
    if isinstance(document, dict) and document:
        how = draw(st.sampled_from(["into"] * 5 + ["without", "beside"]))
        name = draw(st.sampled_from(sorted(document)))
        if how == "into":
            return {**document, name: draw(changed(document[name]))}
        rest = {key: value for key, value in document.items() if key != name}
        return rest if how == "without" else {**document, draw(hostile_text): draw(json_values)}
    if isinstance(document, list) and document and draw(st.booleans()):
        return [*document, draw(changed(document[0]))]
    alike = {str: hostile_text, int: hostile_numbers, float: hostile_numbers}.get(type(document), json_values)
    return draw(st.one_of(alike, alike, json_values))


def text_of(value: Any) -> bytes:
    """As Python writes it: with NaN, Infinity and lone surrogates as escapes."""
    return json.dumps(value).encode()


@fuzzed
@given(st.data())
def test_bodies(wire: Wire, data: st.DataObject) -> None:
    """Arbitrary bytes, and JSON that is nearly right, for every route that takes a body."""
    operation = data.draw(st.sampled_from([each for each in wire.operations if each.takes_body]))
    near = changed(data.draw(st.sampled_from(operation.examples))).map(text_of)
    body = data.draw(st.one_of(st.binary(max_size=500), json_values.map(text_of), near))
    if data.draw(st.booleans()):
        body = damaged(body, data)
    fields = (b"Content-Type: application/json",)
    request = wire.request(operation.method, known(wire, operation).encode(), *fields, body=body or b" ")
    wire.judged(request, is_whole=True)


@fuzzed
@given(st.data())
def test_ids_queries_and_header_fields(wire: Wire, data: st.DataObject) -> None:
    """For every route: what stands in its path, behind it, and in the fields that mean something to us."""
    operation = data.draw(st.sampled_from(wire.operations))
    path = operation.path
    for name in ("agent_id", "invocation_id", "name"):
        path = path.replace(f"{{{name}}}", data.draw(path_parts(wire)))
    target = path.encode() + data.draw(queries)
    names = st.sampled_from([name for name in FIELD_NAMES if name not in FRAMING])
    given_fields = data.draw(st.lists(st.tuples(names, field_line), max_size=4))
    fields = [name + b": " + value for name, value in given_fields]
    body = b'{"input": "hello"}' if operation.takes_body else b""
    wire.judged(wire.request(operation.method, target, *fields, body=body), is_whole=True)


FRAMING = (b"Content-Length", b"Transfer-Encoding", b"Connection", b"Upgrade", b"Host", b"Expect")
field_line = field_text.map(lambda value: value.translate(None, b"\r\n\x00"))
query_pairs = st.lists(
    st.tuples(
        st.one_of(
            st.sampled_from("page limit status provider tag q since until cursor nonsense".split()),
            pieces.map(quote_from_bytes),
        ),
        st.one_of(
            pieces.map(quote_from_bytes), st.integers().map(str), st.datetimes().map(lambda at: f"{at.isoformat()}Z"),
            st.sampled_from(["deleted", "", "%", "%zz", "%ff", "%00", "+", "9999-12-31T23:59:59-23:59", "A" * 22]),
        ),
    ),
    max_size=4,
)  # fmt: skip
queries = st.one_of(
    query_pairs.map(lambda pairs: ("?" + "&".join(f"{name}={value}" for name, value in pairs)).encode()),
    pieces.map(lambda raw: b"?" + raw.translate(None, bytes(range(33)))),
)


def path_parts(wire: Wire) -> st.SearchStrategy[str]:
    return st.one_of(
        st.just(wire.agent_id),
        st.just(wire.invocation_id),
        st.uuids().map(str),
        pieces.map(lambda raw: quote_from_bytes(raw, safe="")),
    )


def known(wire: Wire, operation: Operation) -> str:
    """Its path, with ids that there are."""
    path = operation.path.replace("{agent_id}", wire.agent_id).replace("{invocation_id}", wire.invocation_id)
    return path.replace("{name}", "init.js")


def test_it_serves_on(wire: Wire) -> None:
    """The last of this file: after all that, requests are answered as ever."""
    shown = wire.ask("GET", f"/api/external-agents/{wire.agent_id}/invocations/{wire.invocation_id}")
    assert shown["status"] == "succeeded"
