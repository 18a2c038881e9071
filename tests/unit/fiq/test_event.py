"""The event: which bodies are one, what is stored of them, and how a message is read back."""

from __future__ import annotations

import contextlib
import json
from typing import Any
from uuid import UUID

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiq.errors import PoisonError
from fiq.event import (
    MESSAGE_ID_HEADER,
    OWN_MEMBERS,
    RECEIVED_HEADER,
    Event,
    InvalidBodyError,
    NotJsonError,
    check_body,
    decode,
    parse_exactly,
)

EVENT_ID = UUID("aa4d205e-3bfa-81b2-8bc0-91f8ffe555a3")
BODY = b'{"event_type":"A"}'

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(json_values, st.text(min_size=1).filter(lambda text: text.isprintable()))
def test_any_object_with_an_event_type_is_an_event(payload: Any, event_type: str) -> None:
    """The payload may be any JSON, and the body is stored byte for byte."""
    body = json.dumps({"event_type": event_type, "payload": payload}).encode()
    assert body == check_body(body)


@given(json_values)
def test_line_breaks_between_tokens_become_spaces(payload: Any) -> None:
    """A payload dataset stays readable as NDJSON, and the document means the same."""
    body = json.dumps({"event_type": "A", "payload": payload}, indent=1).replace("\n", "\r\n").encode()
    stored = check_body(body)
    assert len(body) == len(stored)
    assert b"\n" not in stored
    assert b"\r" not in stored
    assert orjson.loads(body) == orjson.loads(stored)


def test_an_escaped_line_break_in_a_text_is_kept() -> None:
    """Only raw ones are replaced; JSON has none within a string."""
    body = b'{"event_type":"A","payload":"one\\ntwo"}'
    assert body == check_body(body)


@given(st.binary(max_size=200))
def test_any_bytes_are_an_event_or_refused(body: bytes) -> None:
    """No input makes the check fail in any other way."""
    with contextlib.suppress(InvalidBodyError):
        assert len(body) == len(check_body(body))


@pytest.mark.parametrize(
    "body",
    [b"", b" ", b"{", b"{}x", b"NaN", b'{"event_type":"\xff"}', b"\xef\xbb\xbf{}", b"'a'", b'{"a":1,}', b"[" * 5000],
    ids=["empty", "blank", "cut", "rest", "nan", "latin-1", "bom", "quotes", "comma", "deep"],
)
def test_what_is_no_json_is_told_apart_from_what_is_no_event(body: bytes) -> None:
    """The first is a 400, the second a 422."""
    with pytest.raises(NotJsonError):
        check_body(body)


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"1",
        b"null",
        b'"event_type"',
        b"{}",
        b'{"event_type":""}',
        b'{"event_type":1}',
        b'{"event_type":null}',
        b'{"event_type":["A"]}',
    ],
)
def test_json_without_an_event_type_is_no_event(body: bytes) -> None:
    """The event type is a string that is not empty."""
    with pytest.raises(InvalidBodyError) as caught:
        check_body(body)
    assert not isinstance(caught.value, NotJsonError)


@pytest.mark.parametrize("name", OWN_MEMBERS)
@pytest.mark.parametrize(
    "body",
    [
        b'{"event_type":"A","NAME":"B","NAME":"C"}',
        b'{"NAME":"B","event_type":"A","payload":{"secret":["NAME",1]},"ESCAPED" : "C"}',
        b'{"event_type":"A","ESCAPED":"B","x":{"NAME":1},"ESCAPED":"C\\u00e9"}',
    ],
)
def test_a_member_that_is_read_occurs_once(body: bytes, name: str) -> None:
    """Of equal names parsers take the first or the last: a reader must not see another event than was authorised."""
    escaped = "".join(f"\\u{ord(one):04X}" if n % 2 else one for n, one in enumerate(name))
    raw = body.replace(b"NAME", name.encode()).replace(b"ESCAPED", escaped.encode())
    with pytest.raises(InvalidBodyError, match=f"^{'(event_type|' + name + ')'} occurs more than once") as caught:
        check_body(raw)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        b'{"event_type":"A","payload":{"payload":1,"payload":2,"event_type":"B","event_type":"C"}}',
        b'{"event_type":"A","Payload":1,"payload":2,"PAYLOAD":3,"pay\\u006Coad2":4}',
        b'{"event_type":"payload","payload":["payload","payload"],"other":"\\"payload\\":"}',
        b'{"event_type":"A","x\\"payload":1,"payload":2,"x":{"payload":"\\u0070"}}',
        b'{"event_type":"A","other":1,"other":2}',
        b'{"event_type":"A","payload\\u0000fiq1":1,"payload":{"payload":2}}',
    ],
)
def test_names_within_the_payload_and_of_the_client_are_its_own(body: bytes) -> None:
    """What is not read by name is not looked at."""
    assert body == check_body(body)


def test_an_error_about_json_holds_no_trace_of_the_body() -> None:
    """The parser's own exception holds the document: it must not hang on ours."""
    with pytest.raises(NotJsonError) as caught:
        check_body(b'{"name": "a patient", ')
    assert caught.value.__suppress_context__
    assert "patient" not in str(caught.value)


def test_a_message_gives_back_the_event_that_was_sent() -> None:
    """Headers and body together are the whole event."""
    event = Event("c-1", EVENT_ID, 1_700_000_000_000_000_001, BODY)
    assert event == decode("c-1", event.headers(), event.body)


@pytest.mark.parametrize(
    ("consultation", "changes"),
    [
        ("c.1", {}),
        ("other", {}),
        ("c-1", {MESSAGE_ID_HEADER: None}),
        ("c-1", {MESSAGE_ID_HEADER: "c-1/nothing"}),
        ("c-1", {RECEIVED_HEADER: None}),
        ("c-1", {RECEIVED_HEADER: "-1"}),
        ("c-1", {RECEIVED_HEADER: "soon"}),
        ("c-1", {RECEIVED_HEADER: "\u0661"}),
        ("c-1", {RECEIVED_HEADER: str(2**63)}),
    ],
)
def test_a_message_that_ingest_would_not_write_is_poison(consultation: str, changes: dict[str, str | None]) -> None:
    """It is set aside, whatever is wrong with it."""
    headers = Event("c-1", EVENT_ID, 1, BODY).headers() | changes
    with pytest.raises(PoisonError):
        decode(consultation, {name: value for name, value in headers.items() if value is not None}, BODY)


def test_a_message_without_headers_is_poison() -> None:
    """So is one whose body has raw line breaks, which would break the NDJSON of a payload dataset."""
    with pytest.raises(PoisonError):
        decode("c-1", None, BODY)
    with pytest.raises(InvalidBodyError):
        decode("c-1", Event("c-1", EVENT_ID, 1, BODY).headers(), b'{"event_type":\n"A"}')


def test_the_largest_time_that_the_corpus_can_hold_is_taken() -> None:
    """A signed 64-bit count of nanoseconds."""
    event = Event("c-1", EVENT_ID, 2**63 - 1, BODY)
    assert event == decode("c-1", event.headers(), BODY)


@pytest.mark.parametrize("digits", [19, 20, 40, 4300])
def test_a_parsed_integer_keeps_its_digits(digits: int) -> None:
    """However long it is, as far as Python can hold it."""
    text = "9" * digits
    assert {"n": int(text), "d": 0.5} == parse_exactly(b'{"n":%b,"d":0.5}' % text.encode())


def test_an_integer_beyond_pythons_own_limit_becomes_a_float() -> None:
    """It does not make the event unreadable."""
    assert [float("inf")] == parse_exactly(b"[%b]" % (b"9" * 4301))
