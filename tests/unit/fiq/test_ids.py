"""Ids: what is one, and what becomes of an idempotency key."""

from __future__ import annotations

import string
import time
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiq.errors import InvalidIdError
from fiq.event import (
    bare_key,
    check_consultation_id,
    event_id_from_key,
    event_id_from_message_id,
    event_id_of_cloudevent,
    event_id_of_line,
    message_id,
    new_event_id,
)

ID_CHARACTERS = string.ascii_letters + string.digits + "_-"
VISIBLE = "".join(chr(code) for code in range(0x21, 0x7F))


@given(st.text(ID_CHARACTERS, min_size=1, max_size=128))
def test_a_consultation_id_is_letters_digits_underscores_and_dashes(value: str) -> None:
    """It is a NATS token and an HDF5 link name at once, so it is returned as it is."""
    assert value == check_consultation_id(value)


@given(st.text(max_size=140))
def test_anything_else_is_no_consultation_id(value: str) -> None:
    """The check accepts exactly the documented form, whatever Unicode calls a letter or a digit."""
    allowed = 1 <= len(value) <= 128 and all(character in ID_CHARACTERS for character in value)
    try:
        check_consultation_id(value)
    except InvalidIdError:
        assert not allowed
    else:
        assert allowed


@pytest.mark.parametrize("value", ["", "a" * 129, "a.b", "a*", ">", "a b", "a/b", "é", "a\n", "\u0661"])
def test_known_traps_are_no_consultation_ids(value: str) -> None:
    """Wildcards, separators, line ends and non-ASCII digits must not get through."""
    with pytest.raises(InvalidIdError):
        check_consultation_id(value)


def test_the_error_does_not_quote_the_id() -> None:
    """What a client puts into a path may be anything, medical data included."""
    with pytest.raises(InvalidIdError) as caught:
        check_consultation_id("name of a patient")
    assert "patient" not in str(caught.value)


@given(st.text(VISIBLE, min_size=1, max_size=255))
def test_a_key_always_gives_the_same_id(key: str) -> None:
    """A retry must find the first event, so the id is a function of the key."""
    try:
        first = event_id_from_key(key)
    except InvalidIdError:
        assert key == '""'  # quoted, and nothing in the quotes
    else:
        assert first == event_id_from_key(key)


@given(st.text(string.ascii_letters + string.digits + "-._:/", min_size=1, max_size=253))
def test_a_quoted_key_is_the_bare_key(key: str) -> None:
    """The IETF draft has the key as a structured-field string, many clients send it bare: both mean the same."""
    assert event_id_from_key(key) == event_id_from_key(f'"{key}"')


def test_escapes_in_a_quoted_key_are_resolved() -> None:
    """RFC 8941, section 3.3.3: a backslash escapes a quote or a backslash."""
    assert event_id_from_key('a"b\\c') == event_id_from_key('"a\\"b\\\\c"')


@given(st.uuids())
def test_a_key_that_is_a_uuid_is_the_id_itself(value: UUID) -> None:
    """So a client finds its own ids in the corpus."""
    assert value == event_id_from_key(str(value))


def test_any_other_key_becomes_a_uuid_of_version_8() -> None:
    """RFC 9562, section 5.8: a UUID whose bits mean what its maker says."""
    made = event_id_from_key("order-17")
    assert (made.version, made.variant) == (8, "specified in RFC 4122")


def test_the_derived_id_is_stable_across_releases() -> None:
    """A retry may come after an upgrade: this value must never change."""
    assert UUID("aa4d205e-3bfa-81b2-8bc0-91f8ffe555a3") == event_id_from_key("abc")


def test_different_keys_give_different_ids() -> None:
    """Also where they differ in case only."""
    keys = [f"k{number}" for number in range(1000)] + ["K1", "a", "A"]
    assert len(keys) == len({event_id_from_key(key) for key in keys})


@pytest.mark.parametrize("key", ["", '""', " ", "a b", "a\tb", "a\n", "é", "a" * 256, '"' + "a" * 256 + '"', "\x7f"])
def test_a_key_is_1_to_255_visible_ascii_characters(key: str) -> None:
    """Anything else is refused instead of being trimmed."""
    with pytest.raises(InvalidIdError):
        event_id_from_key(key)


def test_a_new_id_is_a_uuid_of_version_7_with_the_time() -> None:
    """RFC 9562, section 5.7: the first 48 bits are the Unix time in milliseconds."""
    before = time.time_ns() // 1_000_000
    made = new_event_id()
    after = time.time_ns() // 1_000_000
    assert (made.version, made.variant) == (7, "specified in RFC 4122")
    assert before <= made.int >> 80 <= after


def test_new_ids_are_unique() -> None:
    """74 bits are random."""
    assert len({new_event_id() for _ in range(10_000)}) == 10_000


@given(st.text(ID_CHARACTERS, min_size=1, max_size=128), st.uuids())
def test_a_message_id_leads_back_to_its_event_id(consultation: str, event_id: UUID) -> None:
    """What ingest writes into the header is what the persister reads."""
    assert event_id == event_id_from_message_id(message_id(consultation, event_id), consultation)


@pytest.mark.parametrize(
    "value",
    [
        "c",
        "c/",
        "/aa4d205e-3bfa-81b2-8bc0-91f8ffe555a3",
        "d/aa4d205e-3bfa-81b2-8bc0-91f8ffe555a3",
        "c/AA4D205E-3BFA-81B2-8BC0-91F8FFE555A3",
        "c/aa4d205e3bfa81b28bc091f8ffe555a3",
        "c/aa4d205e-3bfa-81b2-8bc0-91f8ffe555a3\n",
        "c//aa4d205e-3bfa-81b2-8bc0-91f8ffe555a3",
    ],
)
def test_a_message_id_of_another_form_or_consultation_is_refused(value: str) -> None:
    """A message that another program put into the stream is poison, not an event."""
    with pytest.raises(InvalidIdError):
        event_id_from_message_id(value, "c")


@given(st.text(string.ascii_letters + string.digits, min_size=1, max_size=200), st.integers(1, 1000))
def test_a_line_of_a_batch_has_the_id_of_a_key_that_a_client_can_write(key: str, line: int) -> None:
    """So a single event can be sent again by itself."""
    assert event_id_from_key(f"{key}:{line}") == event_id_of_line(bare_key(f'"{key}"'), line)


def test_the_lines_of_the_longest_key_have_ids_too() -> None:
    """Key and number together may be longer than a key."""
    assert len({event_id_of_line("k" * 255, line) for line in range(1, 1001)}) == 1000


def test_a_cloudevents_id_is_that_of_its_source_and_id_together() -> None:
    """The specification makes only the pair unique; where one ends and the other begins counts."""
    pairs = [("/a", "1"), ("/a", "2"), ("/b", "1"), ("/a1", ""), ("", "/a1"), ("/ä", "1")]

    ids = {event_id_of_cloudevent(source, identifier) for source, identifier in pairs}

    assert len(ids) == len(pairs)
    assert {8} == {event_id.version for event_id in ids}
    assert event_id_of_cloudevent("/a", "1") == event_id_of_cloudevent("/a", "1")
