"""Reading from an open store between appends, without a stale chunk in HDF5."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fiq.corpus import Consultation, CorpusFormatError, EventStore, Record, StoreOptions
from fiq.corpus.format import MOST_ACTIVE
from tests.support.corpus import IDENTITY, append_range, commit_range, consultation_of, expected, record


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EventStore]:
    with EventStore.create(tmp_path / "00.h5", IDENTITY) as made:
        yield made


def found(store: EventStore, name: str) -> Consultation:
    with store.reading() as lookup:
        consultation = lookup.consultation(name)
    assert consultation is not None
    return consultation


def test_every_row_and_body_is_what_was_appended(store: EventStore) -> None:
    """Over many chunks of both datasets."""
    commit_range(store, range(1, 1001))
    for name, events in expected(1000).items():
        held = found(store, name)
        rows = [held.row(index) for index in range(len(held))]
        assert events == [(row.sequence, row.written_ns, row.event_id, held.body(row)) for row in rows]
        assert [body for _, _, _, body in events[3:40]] == held.bodies(rows[3:40])
        assert [] == held.bodies([])


def test_a_reader_sees_what_is_appended_to_chunks_that_it_has_read(store: EventStore) -> None:
    """HDF5 caches no chunk: it would not show a later append, which goes past HDF5."""
    for last in range(1, 101):
        commit_range(store, range(last, last + 1), consultations=1)
        held = found(store, consultation_of(1, 1))
        row = held.row(len(held) - 1)
        assert (last, record(last).body) == (row.sequence, held.body(row))


def test_a_position_is_found_between_sequences_too(store: EventStore) -> None:
    """Sequences have gaps: other consultations' events."""
    for sequence in range(10, 2001, 10):
        store.append("c", [record(sequence)])
    store.commit(2000)
    held = found(store, "c")
    assert [0, 0, 1, 1, 199, 200] == [held.first_after(sequence) for sequence in (0, 9, 10, 19, 1999, 2000)]


def test_names_are_sorted_from_anywhere_on(tmp_path: Path) -> None:
    """New ones appear with their first append; those of conflicts do not."""
    options = StoreOptions(open_consultations=16)
    with EventStore.create(tmp_path / "00.h5", IDENTITY, options) as store:
        for sequence in range(1, 501):
            store.append(f"c{sequence * 7919 % 1009}", [record(sequence)])
        store.commit(500)
        store.append_conflicts("b", [record(501)])
        names = sorted(f"c{sequence * 7919 % 1009}" for sequence in range(1, 501))
        with store.reading() as lookup:
            assert names == list(lookup.names())
            assert names[77:] == list(lookup.names(names[77]))
            assert names[77:] == list(lookup.names(names[76] + "-"))
            assert [] == list(lookup.names("d"))
            store.append("a", [record(502)])
            assert ["a", *names] == list(lookup.names())


def test_the_newest_activity_comes_first_and_is_kept_by_a_close(tmp_path: Path) -> None:
    """A file that was not closed knows it as of its last checkpoint."""
    path = tmp_path / "00.h5"
    with EventStore.create(path, IDENTITY) as store:
        for sequence, name in enumerate(["a", "b", "c", "a"], 1):
            store.append(name, [record(sequence)])
        store.commit(4)
    expected = [(record(4).received_ns, "a"), (record(3).received_ns, "c"), (record(2).received_ns, "b")]
    store = EventStore.open(path, expected=IDENTITY)
    with store.reading() as lookup:
        assert expected == lookup.newest()
    store.append("d", [record(5)])
    store.commit(5)
    assert store.maybe_checkpoint(now=True)
    store.append("e", [record(6)])
    store.commit(6)
    with store.reading() as lookup:
        assert ["e", "d", "a", "c", "b"] == [name for _, name in lookup.newest()]
    store.abandon()
    with EventStore.open(path, expected=IDENTITY) as store, store.reading() as lookup:
        assert ["d", "a", "c", "b"] == [name for _, name in lookup.newest()]


def test_activity_is_bounded(tmp_path: Path) -> None:
    """Those whose last events are oldest are dropped first."""
    with EventStore.create(tmp_path / "00.h5", IDENTITY) as store:
        for sequence in range(1, MOST_ACTIVE + 11):
            store.append(f"c{sequence}", [record(sequence)])
        store.append("c11", [record(MOST_ACTIVE + 11)])
        store.commit(MOST_ACTIVE + 11)
    with EventStore.open(tmp_path / "00.h5", expected=IDENTITY) as store, store.reading() as lookup:
        names = [name for _, name in lookup.newest()]
    assert ["c11", *(f"c{number}" for number in range(MOST_ACTIVE + 10, 11, -1))] == names


def test_a_consultation_that_does_not_exist_is_none(store: EventStore) -> None:
    """Also one that could not."""
    with store.reading() as lookup:
        assert [None, None, None] == [lookup.consultation(name) for name in ("c", "", "a/b")]
        assert [] == list(lookup.names())


def test_what_is_not_committed_is_counted(store: EventStore) -> None:
    """An answer from the store must not contain it."""
    append_range(store, range(1, 4))
    assert 3 == store.uncommitted
    store.commit(3)
    assert 0 == store.uncommitted


def test_content_that_hdf5_does_not_accept_spoils_the_read_and_not_the_store(store: EventStore) -> None:
    """Or a reader of one damaged consultation would stop its partition."""
    commit_range(store, range(1, 3))
    held = found(store, consultation_of(1, 7))
    with pytest.raises(CorpusFormatError), store.reading():
        held.lines(1_000_000, 1_000_010)
    store.append("c", [Record(3, 1, 2, bytes(16), b"{}")])
    store.commit(3)
