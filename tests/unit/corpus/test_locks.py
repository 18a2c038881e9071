"""Who may open a file while its writer lives, and what that holds back."""

from __future__ import annotations

import time
from pathlib import Path

import h5py
import pytest

from fiq.corpus import CorpusLockedError, CorpusUsageError, EventStore, StoreOptions, open_corpus
from tests.support.corpus import IDENTITY, append_range, commit_range, expected, stock_contents


def test_a_second_writer_is_refused(path: Path) -> None:
    """There is one writer; the second learns at once that the file is taken, and the first is not disturbed."""
    with EventStore.open(path, expected=IDENTITY) as store:
        with pytest.raises(CorpusLockedError, match=r"another process writes 00\.h5"):
            EventStore.open(path, expected=IDENTITY)
        commit_range(store, range(1, 11))
    assert (10, expected(10)) == stock_contents(path)


def test_a_writer_takes_over_when_the_first_one_is_gone(path: Path) -> None:
    """A lock does not outlive its store, abandoned or closed."""
    EventStore.open(path, expected=IDENTITY).abandon()
    EventStore.open(path, expected=IDENTITY).close()
    EventStore.open(path, expected=IDENTITY).close()


def test_a_stock_reader_holds_back_checkpoints_but_not_commits(path: Path) -> None:
    """What a reader has open does not change under it; the stats say who waits for whom."""
    with EventStore.open(path, expected=IDENTITY, options=StoreOptions(cached_pages=16)) as store:
        commit_range(store, range(1, 101))
        assert store.checkpoint()
        with h5py.File(path, "r") as reader:
            for start in range(101, 401, 50):
                commit_range(store, range(start, start + 50))
                assert not store.checkpoint()
            assert reader.attrs["committed_sequence"] == 100
            assert (
                store.stats.checkpoints_deferred,
                store.stats.checkpoint_deferred_because,
            ) == (6, "a reader has the file open")
        assert store.checkpoint()
        assert store.stats.checkpoint_deferred_because == ""
        assert (400, expected(400)) == stock_contents(path)


def test_an_open_reader_does_not_stop_a_recovery(path: Path) -> None:
    """After a crash the writer goes on from the journal though it cannot make a checkpoint."""
    store = EventStore.open(path, expected=IDENTITY)
    commit_range(store, range(1, 51))
    store.abandon()
    with h5py.File(path, "r") as reader:
        with EventStore.open(path, expected=IDENTITY) as store:
            assert store.committed == 50
            commit_range(store, range(51, 101))
        with EventStore.open(path, expected=IDENTITY) as store:
            assert store.committed == 100
        assert reader.attrs["committed_sequence"] == 0
    EventStore.open(path, expected=IDENTITY).close()
    assert (100, expected(100)) == stock_contents(path)


def test_a_checkpoint_that_had_to_wait_is_not_tried_at_every_commit(path: Path) -> None:
    """The next attempt comes a second later, so that commits stay quick."""
    options = StoreOptions(checkpoint_bytes=1)
    with EventStore.open(path, expected=IDENTITY, options=options) as store, h5py.File(path, "r"):
        for start in range(1, 101, 10):
            commit_range(store, range(start, start + 10))
            assert not store.maybe_checkpoint()
        assert store.stats.checkpoints_deferred in (1, 2)


def test_a_file_that_is_open_for_writing_elsewhere_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stock `r+` that came first keeps the store and the reader out, with an error that says so."""
    monkeypatch.setattr("fiq.corpus.wal.recovery.LOCK_WAIT", 0.1)
    with h5py.File(path, "r+"):
        started = time.monotonic()
        with pytest.raises(CorpusLockedError, match="open for writing in another program"):
            EventStore.open(path, expected=IDENTITY)
        assert time.monotonic() - started < 2
        with open_corpus(path) as corpus, pytest.raises(CorpusLockedError, match="written to"):
            len(corpus)
    EventStore.open(path, expected=IDENTITY).close()


def test_a_checkpoint_in_the_middle_of_a_batch_is_refused(path: Path) -> None:
    """It would need the batch to be complete."""
    store = EventStore.open(path, expected=IDENTITY)
    append_range(store, range(1, 200))
    with pytest.raises(CorpusUsageError, match="commit first"):
        store.checkpoint()
    store.abandon()
