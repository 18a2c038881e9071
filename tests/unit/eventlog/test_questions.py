"""Questions about the corpus and their answers: what is written is read, and nothing else is."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.eventlog.jetstream import reading_wire as wire
from services.eventlog.jetstream.reading_wire import Consultations, Events, Find, MalformedError, Row

NAMES = st.from_regex(r"[A-Za-z0-9_-]{1,128}", fullmatch=True)
NUMBERS = st.integers(0, 2**63 - 1)
IDS = st.uuids()
ROWS = st.lists(st.builds(Row, NUMBERS, NUMBERS, IDS, st.binary(max_size=200)), max_size=20)


@given(st.lists(st.tuples(NAMES, IDS), min_size=1, max_size=20), NAMES, NUMBERS, st.integers(0, wire.MAX_ITEMS))
def test_a_question_is_read_as_it_was_asked(pairs: list[tuple[str, UUID]], name: str, after: int, limit: int) -> None:
    """With the time for which its asker waits."""
    for question in (Find(pairs), Events(name, after, limit), Consultations(name, name, limit)):
        kind = wire.KIND_OF[type(question)]
        assert (question, 1.5) == wire.decode_question(kind, wire.encode_question(question, 1.5))


@given(ROWS, NUMBERS, st.booleans())
def test_an_answer_holds_bodies_byte_for_byte(rows: list[Row], committed: int, more: bool) -> None:
    """Line feeds and anything else: they are cut by their lengths."""
    assert wire.EventsAnswer(committed, rows, more) == wire.decode_events(
        wire.encode_events(committed, rows, more=more)
    )
    question = Find([("c", row.event_id) for row in rows])
    found = dict(enumerate(rows))
    data = wire.encode_found(committed, found, list(range(len(rows))))
    assert wire.FindAnswer(committed, found, list(range(len(rows)))) == wire.decode_found(question, data)


def test_names_come_back() -> None:
    """In their order."""
    data = wire.encode_consultations(["a", "b"], more=True)
    assert wire.ConsultationsAnswer(["a", "b"], more=True) == wire.decode_consultations(data)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("find", b""),
        ("find", b"[]"),
        ("find", b"7"),
        ("find", b"{}"),
        ("find", b'{"within_ms":1000,"events":[]}'),
        ("find", b'{"within_ms":1000,"events":[["a b","6f1b1d4e-0000-4000-8000-000000000000"]]}'),
        ("find", b'{"within_ms":1000,"events":[["a",7]]}'),
        ("find", b'{"within_ms":-1,"events":[["a","6f1b1d4e-0000-4000-8000-000000000000"]]}'),
        ("events", b'{"within_ms":1000,"consultation":"c","after":-1,"limit":1}'),
        ("events", b'{"within_ms":1000,"consultation":"c","after":0,"limit":1001}'),
        ("events", b'{"within_ms":1000,"consultation":"c","after":true,"limit":1}'),
        ("events", b'{"within_ms":1000,"consultation":7,"after":0,"limit":1}'),
        ("consultations", b'{"within_ms":1000,"prefix":"","limit":1}'),
        ("else", b'{"within_ms":1000,"limit":1}'),
    ],
)
def test_what_is_no_question_is_refused(kind: str, data: bytes) -> None:
    """Whoever may ask might send anything; no text of it comes back."""
    with pytest.raises(MalformedError):
        wire.decode_question(kind, data)


@given(st.binary(max_size=100))
def test_any_bytes_are_an_answer_or_malformed(data: bytes) -> None:
    """Never another error."""
    for read in (
        wire.decode_events,
        wire.decode_consultations,
        lambda data: wire.decode_found(Find([("c", UUID(int=1))]), data),
    ):
        try:
            read(data)
        except MalformedError:
            continue


def test_an_answer_about_what_was_not_asked_is_malformed() -> None:
    """An index behind the question's end."""
    with pytest.raises(MalformedError):
        wire.decode_found(Find([("c", UUID(int=1))]), wire.encode_found(1, {}, [1]))


def test_an_answer_that_lost_its_end_is_malformed() -> None:
    """A body cut short must not pass as an event."""
    data = wire.encode_events(1, [Row(1, 1, UUID(int=1), b"{}")], more=False)
    with pytest.raises(MalformedError):
        wire.decode_events(data[:-1])
