"""Questions about the corpus and their answers: what is written is read, and nothing else is."""

from __future__ import annotations

from uuid import UUID

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiq.corpus import hashes_of
from services.log import questions as wire
from services.log.questions import (
    Active,
    Conflicts,
    Consultations,
    Damage,
    Events,
    Find,
    Ids,
    MalformedError,
    Question,
    Row,
    Stored,
    StoredConsultation,
    Summaries,
    Verify,
    VerifyAnswer,
)

NAMES = st.from_regex(r"[A-Za-z0-9_-]{1,128}", fullmatch=True)
NUMBERS = st.integers(0, 2**63 - 1)
IDS = st.uuids()
STORED = st.builds(Stored, NUMBERS, st.binary(min_size=8, max_size=8), NUMBERS)
ROWS = st.lists(st.builds(Row, NUMBERS, NUMBERS, NUMBERS, IDS, st.binary(max_size=200)), max_size=20)


@given(st.lists(IDS, min_size=1, max_size=20), NAMES, NUMBERS, st.integers(0, wire.MAX_ITEMS), st.none() | NUMBERS)
def test_a_question_is_read_as_it_was_asked(
    ids: list[UUID], name: str, after: int, limit: int, before: int | None
) -> None:
    """With the time for which its asker waits."""
    questions: list[Question] = [Ids(name), Find(name, ids), Events(name, after, limit, before)]
    questions += [Consultations(name, name, limit), Active(name, (after, name), limit), Summaries([name, "c"])]
    questions += [Conflicts(name, after, limit), Verify(name), Verify(name, limit, after, after, "ab" * 32)]
    for question in questions:
        kind = wire.KIND_OF[type(question)]
        assert (question, 1.5) == wire.decode_question(kind, wire.encode_question(question, 1.5))


@given(ROWS, NUMBERS, st.booleans())
def test_an_answer_holds_bodies_byte_for_byte(rows: list[Row], committed: int, more: bool) -> None:
    """Line feeds and anything else: they are cut by their lengths."""
    answer = wire.EventsAnswer(committed, rows, more)
    assert answer == wire.decode_events(wire.encode_answer(answer))


@given(st.dictionaries(IDS, STORED), NUMBERS, st.lists(IDS))
def test_what_is_found_comes_back(found: dict[UUID, Stored], committed: int, rest: list[UUID]) -> None:
    """Sequence, digest and time of each, and what is to be asked again."""
    answer = wire.FindAnswer(committed, found, rest)
    assert answer == wire.decode_found(wire.encode_answer(answer))


@given(st.lists(IDS, unique=True, max_size=50), st.lists(IDS, max_size=20), st.binary(min_size=16, max_size=16))
def test_a_snapshot_has_the_hashes_of_the_corpus(held: list[UUID], others: list[UUID], key: bytes) -> None:
    """Two implementations of one function: numpy's for all ids of a table, and one for a single id."""
    hashes = np.sort(hashes_of(key, b"".join(one.bytes for one in held))).astype("<u8").tobytes()
    snapshot = wire.decode_ids(wire.encode_answer(wire.IdsAnswer(key, hashes)))
    assert (True, 8 * len(held)) == (snapshot.whole, snapshot.size)
    assert all(snapshot.may_hold(one) for one in held)
    for one in others:
        assert (hashes_of(key, one.bytes)[0] in np.frombuffer(hashes, "<u8")) == snapshot.may_hold(one)


def test_of_too_many_ids_each_may_be_held() -> None:
    """So each has to be asked for."""
    snapshot = wire.decode_ids(wire.encode_answer(wire.IdsAnswer(bytes(16), None)))
    assert (False, True, 0) == (snapshot.whole, snapshot.may_hold(UUID(int=1)), snapshot.size)


def test_names_come_back() -> None:
    """In their order."""
    answer = wire.ConsultationsAnswer(["a", "b"], more=True)
    assert answer == wire.decode_consultations(wire.encode_answer(answer))


def test_places_and_summaries_come_back() -> None:
    """With times before 1970 too: clocks have been wrong."""
    answer = wire.ActiveAnswer([(5, "b"), (5, "a")], more=True)
    assert answer == wire.decode_active(wire.encode_answer(answer))
    summaries = wire.SummariesAnswer([StoredConsultation("a", 3, -7, 9)], ["b"])
    assert summaries == wire.decode_summaries(wire.encode_answer(summaries))


@pytest.mark.parametrize("more", [False, True])
def test_what_a_verification_found_comes_back(more: bool) -> None:
    """Problems, how far it is, and where the next question begins, if there is one."""
    reached = Verify("c", 1024, 77, 2**64 - 1, "cd" * 32)
    answer = VerifyAnswer(99, 2000, [Damage("chain", "it breaks", 7)], reached if more else None, reached)
    assert answer == wire.decode_verified(wire.encode_answer(answer))


async def test_a_verification_goes_on_where_the_last_answer_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lists the first problems and counts all; when it takes too long it ends where it is."""
    asked: list[Verify] = []

    async def ask(question: Verify) -> VerifyAnswer:
        asked.append(question)
        reached = Verify("c", question.row + 10, 5, 5, "ab" * 32)
        damage = [Damage("chain", "it breaks", question.row + n) for n in range(8)]
        return VerifyAnswer(99, 40, damage, reached if reached.row < 40 else None, reached)

    found = await wire.verify(ask, "c")
    assert [0, 10, 20, 30] == [question.row for question in asked]
    assert (99, 40, 40, 32, "ab" * 32) == (found.committed, found.events, found.checked, found.found, found.chain)
    assert [*range(8), *range(10, 18), *range(20, 24)] == [one.sequence for one in found.problems]
    monkeypatch.setattr(wire, "VERIFY_SECONDS", 0.0)
    assert (40, 10) == ((cut := await wire.verify(ask, "c")).events, cut.checked)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("verify", b'{"within_ms":1000,"consultation":"c","row":0,"sequence":0,"end":0,"chain":"ab"}'),
        ("verify", b'{"within_ms":1000,"consultation":"c","row":-1,"sequence":0,"end":0,"chain":""}'),
        ("verify", b'{"within_ms":1000,"consultation":"c","row":0,"sequence":0,"end":0,"chain":"xx"}'),
        ("verify", b'{"within_ms":1000,"consultation":"c","row":0,"sequence":0,"end":0}'),
        ("conflicts", b'{"within_ms":1000,"consultation":"c","after":0,"limit":1001}'),
        ("conflicts", b'{"within_ms":1000,"consultation":"a b","after":0,"limit":1}'),
        ("find", b""),
        ("find", b"[]"),
        ("find", b"7"),
        ("find", b"{}"),
        ("ids", b'{"within_ms":1000}'),
        ("ids", b'{"within_ms":1000,"consultation":"a b"}'),
        ("find", b'{"within_ms":1000,"consultation":"a","event_ids":[]}'),
        ("find", b'{"within_ms":1000,"consultation":"a b","event_ids":["6f1b1d4e-0000-4000-8000-000000000000"]}'),
        ("find", b'{"within_ms":1000,"consultation":"a","event_ids":[7]}'),
        ("find", b'{"within_ms":-1,"consultation":"a","event_ids":["6f1b1d4e-0000-4000-8000-000000000000"]}'),
        ("events", b'{"within_ms":1000,"consultation":"c","after":-1,"limit":1}'),
        ("events", b'{"within_ms":1000,"consultation":"c","after":0,"limit":1001}'),
        ("events", b'{"within_ms":1000,"consultation":"c","after":true,"limit":1}'),
        ("events", b'{"within_ms":1000,"consultation":7,"after":0,"limit":1}'),
        ("consultations", b'{"within_ms":1000,"prefix":"","limit":1}'),
        ("else", b'{"within_ms":1000,"limit":1}'),
    ],
)
def test_what_is_no_question_is_refused(kind: str, data: bytes) -> None:
    """A client with permission to ask may send anything; its text is never returned."""
    with pytest.raises(MalformedError):
        wire.decode_question(kind, data)


@given(st.binary(max_size=100))
def test_any_bytes_are_an_answer_or_malformed(data: bytes) -> None:
    """Never another error."""
    for read in (wire.decode_ids, wire.decode_events, wire.decode_consultations, wire.decode_found):
        try:
            read(data)
        except MalformedError:
            continue


def test_an_answer_that_lost_its_end_is_malformed() -> None:
    """A body cut short must not pass as an event."""
    events = wire.encode_answer(wire.EventsAnswer(1, [Row(1, 1, 1, UUID(int=1), b"{}")], more=False))
    with pytest.raises(MalformedError):
        wire.decode_events(events[:-1])
    with pytest.raises(MalformedError):
        wire.decode_ids(wire.encode_answer(wire.IdsAnswer(bytes(16), bytes(16)))[:-1])
