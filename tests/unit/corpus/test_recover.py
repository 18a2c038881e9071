"""Recovery without the service."""

from __future__ import annotations

from pathlib import Path

import h5py
import pytest

from fiq.corpus import CorpusLockedError, EventStore, JournalError, recover_partition
from tests.support.corpus import IDENTITY, commit_range, expected, stock_contents


def test_a_torn_commit_is_counted_and_dropped(path: Path) -> None:
    """It was never acknowledged."""
    store = EventStore.open(path, expected=IDENTITY)
    commit_range(store, range(1, 21))
    commit_range(store, range(21, 41))
    store.abandon()
    wal = path.with_name("00.h5.wal")
    content = bytearray(wal.read_bytes())
    # a record ends with a block of 4096 bytes that begins with one of its images at least
    content[-4096:-3584] = b"x" * 512
    wal.write_bytes(content)
    recovered = recover_partition(path)
    assert (20, 1, 1) == (recovered.committed, recovered.replayed, recovered.torn)
    assert (20, expected(20)) == stock_contents(path)


def test_a_second_recovery_finds_nothing_to_do(path: Path) -> None:
    """And changes nothing."""
    with EventStore.open(path, expected=IDENTITY) as store:
        commit_range(store, range(1, 21))
    recover_partition(path)
    again = recover_partition(path)
    assert (20, 0, 0, "") == (again.committed, again.replayed, again.torn, again.held_back)


def test_a_file_whose_writer_lives_is_refused(path: Path) -> None:
    """There is nothing to recover."""
    with EventStore.open(path, expected=IDENTITY), pytest.raises(CorpusLockedError, match="another process writes"):
        recover_partition(path)


def test_a_reader_holds_the_copy_back_and_nothing_is_lost(path: Path) -> None:
    """The journal keeps it."""
    store = EventStore.open(path, expected=IDENTITY)
    commit_range(store, range(1, 21))
    store.abandon()
    with h5py.File(path, "r"):
        assert recover_partition(path).held_back
    assert 1 == recover_partition(path).replayed
    assert (20, expected(20)) == stock_contents(path)


def test_a_file_without_its_journal_is_refused(path: Path) -> None:
    """What the journal held would be lost silently."""
    path.with_name("00.h5.wal").unlink()
    with pytest.raises(JournalError, match="has no journal"):
        recover_partition(path)
