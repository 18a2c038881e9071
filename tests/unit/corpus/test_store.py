"""The event store: what it takes, what it finds again, what it refuses."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import h5py
import pytest

from fiq.corpus import (
    AppendRefusedError,
    EventStore,
    IdentityMismatchError,
    KnownIds,
    Record,
    StoreFailedError,
    StoreOptions,
    UnsupportedFileSystemError,
    open_corpus,
    verify_corpus,
)
from fiq.corpus.wal import storage
from tests.support.corpus import IDENTITY, append_range, commit_range, expected, record, stock_contents


def test_what_was_committed_is_found_again(path: Path) -> None:
    """After close and open the file holds every committed event, and the sequence that the commit named."""
    # given
    with EventStore.open(path, expected=IDENTITY) as store:
        for start in range(1, 401, 50):
            commit_range(store, range(start, start + 50))
    # when
    with EventStore.open(path, expected=IDENTITY) as store:
        committed = store.committed
    # then
    assert committed == 400
    assert (400, expected(400)) == stock_contents(path)


def test_a_commit_without_events_moves_the_sequence(path: Path) -> None:
    """A batch of which every event was a duplicate or poison is handled all the same."""
    with EventStore.open(path, expected=IDENTITY) as store:
        store.commit(12)
    with EventStore.open(path, expected=IDENTITY) as store:
        assert store.committed == 12


def test_a_commit_keeps_the_message_id_at_its_sequence(path: Path) -> None:
    """By it the writer knows whether a log is the one that the file was written from."""
    with EventStore.open(path, expected=IDENTITY) as store:
        store.append("c", [record(1)])
        store.commit(1, "c/first")
        assert (1, "c/first") == (store.committed, store.committed_id)
        store.commit(7, "other/id")
    with EventStore.open(path, expected=IDENTITY) as store:
        assert (7, "other/id") == (store.committed, store.committed_id)
        store.place(2)
        assert (7, "other/id") == (store.committed, store.committed_id)
    with open_corpus(path) as corpus:
        assert "other/id" == corpus.partitions[0].committed_id


def test_conflicts_are_kept_apart_in_the_same_commit(path: Path) -> None:
    """An event under a used id is no part of its consultation, and no less safe."""
    first, second = record(1), record(2)
    other = replace(second, event_id=first.event_id, body=b'{"event_type":"other"}')
    with EventStore.open(path, expected=IDENTITY) as store:
        store.append("c", [first])
        store.append_conflicts("c", [other, replace(other, sequence=3)])
        store.commit(3)
        store.append_conflicts("c", [replace(other, sequence=9)])
        store.abandon()
    with open_corpus(path) as corpus:
        (kept,) = corpus.conflicts()
        assert [(2, other.body), (3, other.body)] == [(event.sequence, event.raw) for event in kept]
        assert [first.body] == [event.raw for event in corpus["c"]]
        assert (1, 2) == (corpus.partitions[0].events, corpus.partitions[0].conflicts)
    assert () == verify_corpus(path).problems


def test_a_file_that_is_placed_anew_says_so_even_when_the_writer_is_killed(path: Path) -> None:
    """Its events, their chain and the committed sequence stay; who expects the earlier epoch is refused."""
    with EventStore.open(path, expected=IDENTITY) as store:
        store.append("c", [record(1)])
        store.commit(1)
    store = EventStore.open(path, expected=IDENTITY)
    store.place(5)
    store.abandon()
    with pytest.raises(IdentityMismatchError, match=r"epoch is 5 in the file but 1 is expected"):
        EventStore.open(path, expected=IDENTITY)
    with EventStore.open(path, expected=replace(IDENTITY, epoch=5)) as store:
        store.append("c", [record(2)])
        store.commit(2)
    assert verify_corpus(path).clean
    assert 2 == stock_contents(path)[0]


def test_a_file_that_begins_late_says_so_and_counts_what_came_before_as_done(tmp_path: Path) -> None:
    """The stream was trimmed before its store began."""
    path = tmp_path / "00.h5"
    with EventStore.create(path, IDENTITY, begins=501) as store:
        assert (501, 500) == (store.begins, store.committed)
        store.append("c", [record(501)])
        store.commit(501)
    with open_corpus(path) as corpus:
        (info,) = corpus.partitions
        assert (501, 501) == (info.begins, info.committed)
    assert [501] == [one.begins for one in verify_corpus(path).partitions]


def test_a_file_can_begin_another_store(path: Path) -> None:
    """As a seed: other store, other volume, the same events and chains; stock readers see whose it is."""
    volume = "99999999-2222-4333-8444-555555555555"
    with EventStore.open(path, expected=IDENTITY) as store:
        commit_range(store, range(1, 21))
        store.place(2, store="second", volume=volume)
    seeded = replace(IDENTITY, store="second", volume=volume, epoch=2)
    with EventStore.open(path, expected=seeded) as store:
        assert 20 == store.committed
    with h5py.File(path, "r") as file:
        assert ("second", volume, 2) == (file.attrs["store"], file.attrs["volume"], file.attrs["epoch"])
    assert verify_corpus(path).clean


def test_an_event_is_known_before_and_after_its_commit_and_after_a_reopen(path: Path) -> None:
    """What is committed, and what is only appended."""
    first, second, unknown = record(1), record(2), record(3)
    with EventStore.open(path, expected=IDENTITY) as store:
        assert not store.held("c", [first.event_id])
        store.append("c", [first])
        assert store.held("c", [first.event_id])
        store.commit(1)
        store.append("c", [second])
        store.commit(2)
    with EventStore.open(path, expected=IDENTITY) as store:
        held = store.held("c", [event.event_id for event in (first, second, unknown)])
        assert {first.event_id, second.event_id} == held.keys()
        assert not store.held("other", [first.event_id])


def test_ids_that_end_in_zeros_are_kept_whole(path: Path) -> None:
    """An id is 16 bytes, whatever they are."""
    ids = [bytes(16), b"a" * 15 + b"\0", bytes(15) + b"a"]
    with EventStore.open(path, expected=IDENTITY) as store:
        store.append("c", [Record(n, 0, 2, event_id, b"{}") for n, event_id in enumerate(ids, 1)])
        store.commit(3)
    with EventStore.open(path, expected=IDENTITY) as store:
        assert ids == list(store.held("c", ids))
    assert ids == [event_id for _, _, event_id, _ in stock_contents(path)[1]["c"]]


def test_what_is_not_committed_is_gone_after_a_close(path: Path) -> None:
    """close() drops what no commit covered, and keeps the rest."""
    with EventStore.open(path, expected=IDENTITY) as store:
        commit_range(store, range(1, 31))
        append_range(store, range(31, 61))
    assert (30, expected(30)) == stock_contents(path)


def test_an_abandoned_store_writes_nothing(path: Path) -> None:
    """After abandon() both files are byte for byte what they were after the last commit."""
    # given
    store = EventStore.open(path, expected=IDENTITY)
    commit_range(store, range(1, 31))
    files = [path, path.with_name("00.h5.wal")]
    before = [file.read_bytes() for file in files]
    append_range(store, range(31, 2000))
    # when
    store.abandon()
    # then
    assert before == [file.read_bytes() for file in files]
    with EventStore.open(path, expected=IDENTITY) as store:
        assert store.committed == 30
        commit_range(store, range(31, 61))
    assert (60, expected(60)) == stock_contents(path)


def test_a_store_that_failed_refuses_everything_until_it_is_opened_again(path: Path) -> None:
    """After an error the state of HDF5's memory is unknown: the store refuses every call."""
    store = EventStore.open(path, expected=IDENTITY)
    commit_range(store, range(1, 11))
    with pytest.raises(AppendRefusedError):
        store.append("c-0001", [record(3)])
    for call in (
        lambda: store.append("c-0001", [record(11)]),
        lambda: store.held("c-0001", [bytes(16)]),
        lambda: store.commit(11),
        store.checkpoint,
        store.maybe_checkpoint,
    ):
        with pytest.raises(StoreFailedError, match="abandon it and open it again"):
            call()
    store.close()
    with EventStore.open(path, expected=IDENTITY) as store:
        commit_range(store, range(11, 21))
    assert (20, expected(20)) == stock_contents(path)


@pytest.mark.parametrize(
    ("consultation", "records"),
    [
        ("c", [record(7), record(7)]),
        ("c", [record(8), record(7)]),
        ("c", [record(5)]),
        ("c", [Record(7, 0, 2, b"short", b"{}")]),
        ("c", [Record(7, 0, 2, bytes(16), b'{"a":\n1}')]),
        ("c", [Record(7, 0, 2, bytes(16), b"")]),
        ("c", [Record(7, 2**63, 2, bytes(16), b"{}")]),
        ("c", [Record(7, 0, 2**63, bytes(16), b"{}")]),
        ("c", [Record(7, 0, -(2**63), bytes(16), b"{}")]),
        ("a/b", [record(7)]),
        ("", [record(7)]),
        ("x" * 129, [record(7)]),
    ],
)
def test_a_record_that_would_break_the_format_is_refused(path: Path, consultation: str, records: list[Record]) -> None:
    """Sequences rise above what is committed, ids have 16 bytes, bodies are one line, names are consultation ids."""
    with EventStore.open(path, expected=IDENTITY) as store:
        commit_range(store, range(1, 7))
        with pytest.raises(AppendRefusedError):
            store.append(consultation, records)
    EventStore.open(path, expected=IDENTITY).close()
    assert (6, expected(6)) == stock_contents(path)


def test_a_commit_below_an_appended_event_is_refused(path: Path) -> None:
    """Such an event would be delivered again though the file holds it."""
    with EventStore.open(path, expected=IDENTITY) as store:
        store.append("c", [record(9)])
        with pytest.raises(AppendRefusedError, match="below 9"):
            store.commit(8)


def test_consultations_that_were_closed_for_others_go_on_where_they_were(path: Path) -> None:
    """With room for three consultations, sixty are appended to in turn, and duplicates are found in all of them."""
    options = StoreOptions(open_consultations=3, ids=KnownIds(400), cached_pages=8)
    with EventStore.open(path, expected=IDENTITY, options=options) as store:
        for start in range(1, 1201, 40):
            batch = range(start, start + 40)
            commit_range(store, batch, consultations=60)
            assert store.stats.open_consultations <= 3
        for consultation, events in expected(1200, 60).items():
            assert len(events) == len(store.held(consultation, [event_id for _, _, event_id, _ in events]))
            assert not store.held(consultation, [record(1201).event_id])
    assert (1200, expected(1200, 60)) == stock_contents(path)


def test_large_and_tiny_events_are_neighbours(path: Path) -> None:
    """A body of 1 MiB spans many chunks; its neighbours of a few bytes share one."""
    sizes = [2, 1 << 20, 2, 4095, 4096, 4097, 1 << 20, 3]
    bodies = [b'"' + b"x" * (size - 2) + b'"' for size in sizes]
    with EventStore.open(path, expected=IDENTITY) as store:
        for sequence, body in enumerate(bodies, 1):
            store.append("c", [Record(sequence, 0, 2, uuid4().bytes, body)])
            store.commit(sequence)
    with open_corpus(path) as corpus:
        assert bodies == [event.raw for event in corpus["c"]]


def test_thousands_of_consultations_fit_into_one_file(path: Path) -> None:
    """Groups are many and small; each is found again."""
    with EventStore.open(path, expected=IDENTITY, options=StoreOptions(open_consultations=500)) as store:
        for start in range(1, 2401, 800):
            commit_range(store, range(start, start + 800), consultations=1200)
    assert (2400, expected(2400, 1200)) == stock_contents(path)


def test_every_way_to_cut_a_run_of_events_into_appends_gives_the_same_file(tmp_path: Path) -> None:
    """Chunks are filled across appends, commits and reopens."""
    chance = random.Random(5)
    path = tmp_path / "00.h5"
    EventStore.create(path, IDENTITY).close()
    done = 0
    while done < 600:
        with EventStore.open(path, expected=IDENTITY) as store:
            for _ in range(chance.randrange(1, 6)):
                size = chance.choice([1, 2, 31, 32, 33, 64, 100])
                for sequence in range(done + 1, done + size + 1):
                    append_range(store, [sequence], consultations=2)
                done += size
                store.commit(done)
    assert (done, expected(done, 2)) == stock_contents(path)


def test_stats_count_what_was_done(path: Path) -> None:
    """An operator sees commits, events, checkpoints and the journal's size."""
    with EventStore.open(path, expected=IDENTITY) as store:
        commit_range(store, range(1, 101))
        append_range(store, [101])
        stats = store.stats
        assert (stats.commits, stats.events, stats.uncommitted_events) == (1, 100, 1)
        assert 0 < stats.journal_bytes == stats.journaled_bytes
        store.commit(101)
        assert store.checkpoint()
        stats = store.stats
        assert (
            stats.commits,
            stats.events,
            stats.uncommitted_events,
            stats.checkpoints,
            stats.journal_bytes,
        ) == (2, 101, 0, 1, 0)


def test_a_checkpoint_is_made_when_the_journal_is_long_or_old(path: Path) -> None:
    """maybe_checkpoint() keeps the journal bounded under load, and stock readers up to date when idle."""
    with EventStore.open(path, expected=IDENTITY, options=StoreOptions(checkpoint_bytes=1)) as store:
        commit_range(store, range(1, 11))
        assert store.maybe_checkpoint()
        assert not store.maybe_checkpoint()
    with EventStore.open(path, expected=IDENTITY, options=StoreOptions(checkpoint_seconds=0)) as store:
        commit_range(store, range(11, 21))
        assert store.maybe_checkpoint()
    with EventStore.open(path, expected=IDENTITY) as store:
        commit_range(store, range(21, 31))
        assert not store.maybe_checkpoint()


def test_a_remote_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS and its like do not keep what flock and fdatasync promise."""
    monkeypatch.setattr(storage, "_file_system_type", lambda _: 0x6969)
    with pytest.raises(UnsupportedFileSystemError, match="NFS"):
        EventStore.create(tmp_path / "00.h5", IDENTITY)
    assert list(tmp_path.iterdir()) == []


def test_a_local_file_system_can_be_told(tmp_path: Path) -> None:
    """The type of the test's own directory is read from the system."""
    assert storage._file_system_type(tmp_path) != 0
    storage.check_file_system(tmp_path)
