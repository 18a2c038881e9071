"""A disk that is really full: nothing committed is lost, recovery needs no room, work goes on when there is some."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fiq.corpus import CorpusIOError, EventStore, open_corpus
from tests.support.corpus import IDENTITY, commit_range, expected, stock_contents
from tests.support.small_disk import KINDS, fill, small_disk
from tests.support.torture import CONSULTATIONS, small_options

_SIZE = 16
#: events of a commit
_BATCH = 100


@pytest.fixture(params=list(KINDS))
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    with small_disk(request.param, tmp_path / "disk", size=_SIZE) as disk:
        yield disk


def test_a_full_disk_stops_commits_and_nothing_else(disk: Path) -> None:
    """Again and again: fill it, fail, recover and make a checkpoint while it is full, make room, go on."""
    path = disk / "00.h5"
    EventStore.create(path, IDENTITY).close()
    reached = 0
    for _ in range(3):
        # given
        acknowledged = _commit_until_full(path, reached)
        assert acknowledged > reached
        # when the disk is full, to the last block
        ballast = fill(disk)
        # then a recovery and its checkpoint work, and both kinds of readers see every commit
        with EventStore.open(path, expected=IDENTITY, options=small_options()) as store:
            reached = store.committed
            assert store.stats.journal_bytes == 0
        assert reached in (acknowledged, acknowledged + _BATCH)
        assert (reached, expected(reached, CONSULTATIONS)) == stock_contents(path)
        with open_corpus(path) as corpus:
            assert corpus.partitions[0].committed == reached
        # and when there is room again, work goes on
        ballast.unlink()


def test_a_file_that_cannot_be_created_leaves_nothing(disk: Path) -> None:
    """It is transient: with room the same call works."""
    ballast = fill(disk)
    with pytest.raises(CorpusIOError, match="No space left on device"):
        EventStore.create(disk / "00.h5", IDENTITY)
    ballast.unlink()
    EventStore.create(disk / "00.h5", IDENTITY).close()


def _commit_until_full(path: Path, reached: int) -> int:
    """Leave room for some commits only, commit until the disk refuses; return the last acknowledged sequence."""
    filler = path.parent / "filler"
    _leave(filler, free=2 << 20)
    store = EventStore.open(path, expected=IDENTITY, options=small_options())
    assert store.committed == reached
    with pytest.raises(CorpusIOError, match="No space left on device"):
        _commit_on_and_on(store)
    acknowledged = store.committed
    store.abandon()
    filler.unlink()
    return acknowledged


def _commit_on_and_on(store: EventStore) -> None:
    for _ in range(500):
        commit_range(store, range(store.committed + 1, store.committed + 1 + _BATCH), CONSULTATIONS)
        store.maybe_checkpoint()


def _leave(filler: Path, *, free: int) -> None:
    ballast = fill(filler.parent)
    ballast.rename(filler)
    with filler.open("r+b") as file:
        file.truncate(max(0, filler.stat().st_size - free))
