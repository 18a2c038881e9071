"""What a dead letter says of its message, and when the message can go back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiq.event import Event, Trace, new_event_id
from services.log.dead_letters import (
    HEADERS_BYTES,
    DeadLetter,
    Listed,
    conflict_letters,
    message_headers,
    read_letter,
)

TIME = "2026-11-23T10:00:00.5Z"
EVENT = Event("c-1", new_event_id(), 1_700_000_000_123_456_789, b'{"event_type":"T","n":12345678901234567890}')
TRACE = Trace(f"00-{'a' * 32}-{'b' * 16}-01", "vendor=" + "x" * 250)
TRACED = Event("c-1", EVENT.event_id, EVENT.received_ns, EVENT.body, TRACE)


def letter(event: Event, **headers: str) -> DeadLetter:
    """Set *event* aside, with other *headers* in the letter, and read the letter."""
    made = message_headers("log/7", 7, event.consultation, event.headers(), "no reason")
    made |= {name.replace("_", "-"): value for name, value in headers.items()}
    return read_letter(3, TIME, "fi.dead.5", made, event.body)


@pytest.mark.parametrize("event", [EVENT, TRACED])
def test_what_goes_back_is_what_ingest_wrote(event: Event) -> None:
    """Subject, headers and body: consultation, id, time of receipt, trace, and each byte."""
    found = letter(event)
    assert found.event == event
    assert found.event is not None
    assert (event.headers(), event.body) == (found.event.headers(), found.event.body)
    assert ("", 0) == (found.obstacle, found.listed)


def test_a_letter_says_where_its_message_was_and_why_it_was_set_aside() -> None:
    """Its own place, the message's, and the trace."""
    found = letter(TRACED)
    assert (3, TIME, 5, "no reason", 7) == (
        found.sequence,
        found.stored,
        found.partition,
        found.reason,
        found.position,
    )
    assert ("c-1", EVENT.message_id, "a" * 32, len(EVENT.body)) == (
        found.consultation,
        found.message_id,
        found.trace_id,
        found.size,
    )


@pytest.mark.parametrize(
    ("headers", "obstacle"),
    [
        ({"Fi_Cut_From_Bytes": "9999"}, "its body was cut"),
        ({"Fi_Altered": "Fi-Consultation"}, "other values in Fi-Consultation"),
        ({"Fi_Received_Ns": "soon"}, "it would be set aside again: Fi-Received-Ns"),
        ({"Fi_Original_Msg_Id": "other/x"}, "it would be set aside again: a message id"),
        ({"Fi_Consultation": "a b"}, "it would be set aside again: a consultation id"),
    ],
)
def test_what_would_only_be_set_aside_again_cannot_go_back(headers: dict[str, str], obstacle: str) -> None:
    """The operator reads why."""
    found = letter(EVENT, **headers)
    assert found.event is None
    assert obstacle in found.obstacle


@pytest.mark.parametrize("body", [b"garbage", b"\xff", b"[]", b'{"event_type":1}'])
def test_a_body_that_is_no_event_cannot_go_back(body: bytes) -> None:
    """And the obstacle does not quote it."""
    made = message_headers("log/7", 7, "c-1", EVENT.headers(), "no reason")
    found = read_letter(3, TIME, "fi.dead.5", made, body)
    assert found.event is None
    assert found.obstacle.startswith("it would be set aside again")
    assert "garbage" not in found.obstacle


def test_a_name_that_lost_characters_is_not_taken_for_another_consultation() -> None:
    """`c-1` with an invisible character in it is not c-1, although the letter's header says so."""
    invisible = "\u200b"
    headers = EVENT.headers() | {"Nats-Msg-Id": f"c-1{invisible}/{EVENT.event_id}"}
    made = message_headers("log/7", 7, f"c-1{invisible}", headers, "bad id")
    assert "c-1" == made["Fi-Consultation"]
    assert read_letter(3, TIME, "fi.dead.5", made, EVENT.body).event is None


@given(st.text(max_size=3000), st.dictionaries(st.text(max_size=50), st.text(max_size=3000), max_size=5), st.text())
def test_headers_are_printable_and_bounded_whatever_the_message_had(
    consultation: str, had: dict[str, str], original: str
) -> None:
    """They are written onto the wire, and count against the size of a letter."""
    had |= {"Nats-Msg-Id": original, "Fi-Received-Ns": original, "traceparent": original, "tracestate": original}
    made = message_headers("log/7", 7, consultation, had, "r" * 300)
    assert all(value.isascii() and value.isprintable() for value in made.values())
    assert sum(len(name) + len(value) + 4 for name, value in made.items()) < HEADERS_BYTES


def test_a_list_of_conflicts_names_its_events() -> None:
    """In one letter or more; it cannot go back itself."""
    conflicts = [(f"c-{number % 3}", 10 + number, number) for number in range(9)]
    letters = [
        read_letter(1, TIME, "fi.dead.5", headers, body) for body, headers in conflict_letters("log", conflicts, 1024)
    ]
    assert [4, 4, 1] == [one.listed for one in letters]
    assert sorted(Listed(*one) for one in conflicts) == sorted(found for one in letters for found in one.conflicts())
    assert {None} == {one.event for one in letters}
    assert all("/conflicts" in one.obstacle for one in letters)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"garbage",
        b"[]",
        b'{"consultation_id":"a b","conflicts":[[1,2]]}',
        b'{"consultation_id":"c","conflicts":[1]}',
    ],
)
def test_a_malformed_list_names_nothing(body: bytes) -> None:
    """Whoever wrote it."""
    assert [] == read_letter(1, TIME, "fi.dead.x", {"Fi-Listed": "2"}, body).conflicts()


def test_a_foreign_message_among_the_letters_is_one_without_origin() -> None:
    """It can be looked at and dropped."""
    found = read_letter(3, TIME, "fi.dead.other", {}, b"\xff")
    assert (0, "", 0, "", "", None) == (
        found.partition,
        found.reason,
        found.position,
        found.consultation,
        found.message_id,
        found.event,
    )
