"""Checkpoints while commits go on: what is possible while one runs, and what a failed one does."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from fiq.corpus import CorpusIOError, EventStore, StorageIO, StoreFailedError, StoreOptions, open_corpus
from tests.support.corpus import IDENTITY, commit_range, expected, stock_contents
from tests.support.faulty_io import FailingIO
from tests.support.polling import eventually_sync


class _SlowIO(StorageIO):
    """Holds the sync that ends a checkpoint's copy until the test lets it go on."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.holding = threading.Event()

    def fsync(self, fd: int) -> None:
        self.holding.set()
        assert self.go_on.wait(30)
        super().fsync(fd)


@pytest.fixture
def slow() -> Iterator[_SlowIO]:
    slow = _SlowIO()
    yield slow
    slow.go_on.set()


def _begin_slow_checkpoint(path: Path, slow: _SlowIO, **limits: int) -> EventStore:
    """Open a store and commit 100 events; a checkpoint of them is half way."""
    store = EventStore.open(path, expected=IDENTITY, options=StoreOptions(io=slow, **limits))  # type: ignore[arg-type]
    commit_range(store, range(1, 101))
    assert store.maybe_checkpoint(now=True)
    assert slow.holding.wait(30)
    return store


@pytest.mark.parametrize("cached_pages", [8192, 4])
def test_commits_go_on_while_a_checkpoint_runs(path: Path, slow: _SlowIO, cached_pages: int) -> None:
    """They append after what is copied; nothing waits, whether pages stay in memory or not."""
    store = _begin_slow_checkpoint(path, slow, cached_pages=cached_pages)
    for start in range(101, 401, 20):
        commit_range(store, range(start, start + 20), consultations=30)
        assert not store.maybe_checkpoint(now=True)
    assert (store.stats.checkpoints, store.stats.checkpoint_running) == (0, True)
    slow.go_on.set()
    assert store.checkpoint()
    assert (store.stats.checkpoints, store.stats.checkpoint_running, store.stats.journal_bytes) == (2, False, 0)
    commit_range(store, range(401, 421))
    store.close()
    contents = expected(100) | {}
    with open_corpus(path) as corpus:
        found = [event.sequence for name in corpus for event in corpus[name]]
    assert sorted(found) == list(range(1, 421))
    assert contents["c-0001"][0] == stock_contents(path)[1]["c-0001"][0]


def test_a_crash_while_a_checkpoint_runs_loses_nothing(path: Path, slow: _SlowIO, tmp_path: Path) -> None:
    """A copy of the pair at that moment is what a crash would leave."""
    store = _begin_slow_checkpoint(path, slow)
    commit_range(store, range(101, 121))
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    for file in (path, path.with_name("00.h5.wal")):
        (crashed / file.name).write_bytes(file.read_bytes())
    slow.go_on.set()
    store.close()
    with EventStore.open(crashed / "00.h5", expected=IDENTITY) as recovered:
        assert recovered.committed == 120
    assert (120, expected(120)) == stock_contents(crashed / "00.h5")


def test_readers_never_see_a_half_copied_file(path: Path, slow: _SlowIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock h5py reports that the file is locked; open_corpus waits for the checkpoint to end."""
    monkeypatch.setattr("fiq.corpus.wal.recovery.LOCK_WAIT", 30.0)
    store = _begin_slow_checkpoint(path, slow)
    with pytest.raises(OSError, match="lock"):
        h5py.File(path, "r")
    timer = threading.Timer(0.2, slow.go_on.set)
    timer.start()
    with open_corpus(path) as corpus:
        assert corpus.partitions[0].committed == 100
    timer.join()
    store.close()


def test_readers_are_let_in_as_soon_as_the_copy_is_made(path: Path) -> None:
    """Also when the writer has nothing to do and calls nothing."""
    with EventStore.open(path, expected=IDENTITY) as store:
        commit_range(store, range(1, 11))
        assert store.maybe_checkpoint(now=True)
        assert eventually_sync(lambda: _committed(path) == 10)


@pytest.mark.parametrize("kind", ["pwrite", "fdatasync", "fsync"])
def test_the_next_call_reports_a_checkpoint_that_failed(path: Path, kind: str) -> None:
    """The store is of no use then; opened again it has every commit."""
    io = FailingIO(kind, 10_000, errno.EIO)
    store = EventStore.open(path, expected=IDENTITY, options=StoreOptions(io=io))
    commit_range(store, range(1, 101))
    io.fail_after({"pwrite": 3, "fdatasync": 1, "fsync": 0}[kind])  # a commit of the activity comes first
    assert store.maybe_checkpoint(now=True)
    assert eventually_sync(lambda: io.failed)
    with pytest.raises(CorpusIOError, match=r"cannot checkpoint 00\.h5: Input/output error"):
        _commit_on_and_on(store)
    committed = store.committed
    with pytest.raises(StoreFailedError):
        store.maybe_checkpoint()
    store.abandon()
    with EventStore.open(path, expected=IDENTITY) as store:
        assert store.committed in (committed, committed + 10)
        assert stock_contents(path)[0] == store.committed


def test_what_is_committed_can_be_copied_however_full_the_disk(path: Path) -> None:
    """The growth of the file is reserved before the commit; where it cannot be, nothing is committed."""
    io = FailingIO("reserve", 10_000, errno.ENOSPC)
    store = EventStore.open(path, expected=IDENTITY, options=StoreOptions(io=io))
    commit_range(store, range(1, 101))
    held = path.stat().st_blocks * 512
    assert held >= store._file._cache.size
    io.fail_after(0, times=2)
    with pytest.raises(CorpusIOError, match=r"cannot commit to 00\.h5\.wal: No space left on device"):
        commit_range(store, range(101, 10_000), consultations=2000)
    store.abandon()
    with EventStore.open(path, expected=IDENTITY) as store:
        assert store.committed == 100


def test_a_journal_beyond_its_limit_is_compacted_while_a_reader_holds_the_file(path: Path, tmp_path: Path) -> None:
    """One reader stays open for as long as it likes: the journal grows by what is new only, commits go on."""
    options = StoreOptions(checkpoint_bytes=50_000, checkpoint_seconds=0, journal_limit=400_000, cached_pages=32)
    journal = path.with_name("00.h5.wal")
    with EventStore.open(path, expected=IDENTITY, options=options) as store:
        with h5py.File(path, "r") as stock:
            for number in range(1, 601):
                commit_range(store, range(number, number + 1), consultations=5)
                store.maybe_checkpoint(now=True)
                if number == 100:
                    early = open_corpus(path)
                    assert early.partitions[0].committed == 100
            stats = store.stats
            assert stock.attrs["committed_sequence"] == 0
        assert stats.compactions > 2
        assert stats.journaled_bytes > 2_500_000
        assert journal.stat().st_size < 1_000_000
        assert (stats.checkpoint_deferred_because, stats.checkpoints) == ("a reader has the file open", 0)
        assert stats.checkpoint_waiting_seconds > 0
        # the reader of the old journal still has all of its moment
        assert sum(map(len, early.values())) == 100
        early.close()
        with open_corpus(path) as corpus:
            assert sum(map(len, corpus.values())) == 600
        store.abandon()
    with EventStore.open(path, expected=IDENTITY) as store:
        assert store.committed == 600
    assert (600, expected(600, 5)) == stock_contents(path)
    assert [file.name for file in tmp_path.iterdir() if file.name.endswith(".new")] == []


def test_records_without_a_sector_are_compacted_too(path: Path) -> None:
    """A record without a sector is legal, and so is a journal of nothing else: jumps are such records."""
    options = StoreOptions(checkpoint_seconds=0, journal_limit=1)
    with EventStore.open(path, expected=IDENTITY, options=options) as store, h5py.File(path, "r"):
        for _ in range(20):
            store._file._journal.append(store._file._cache.size, np.empty((0, 2), np.uint64), [])
            store.maybe_checkpoint(now=True)

        def compacted() -> bool:
            store.maybe_checkpoint(now=True)
            return store.stats.compactions > 0

        eventually_sync(compacted)
        commit_range(store, range(1, 11))
    assert (10, expected(10)) == stock_contents(path)


def test_a_compaction_without_room_changes_nothing(path: Path) -> None:
    """Commits go on in the old journal."""
    io = FailingIO("fsync", 10_000, errno.ENOSPC)
    options = StoreOptions(io=io, checkpoint_seconds=0, journal_limit=100_000)
    with EventStore.open(path, expected=IDENTITY, options=options) as store, h5py.File(path, "r"):
        io.fail_after(0)
        _commit_and_checkpoint(store, 100)
        assert io.failed
    assert (100, expected(100)) == stock_contents(path)


@pytest.mark.parametrize("kind", ["rename", "sync_directory"])
def test_a_compaction_that_cannot_be_installed_leaves_no_lock(path: Path, kind: str) -> None:
    """Whichever journal is there, the next store opens it, in the same process as well."""
    io = FailingIO(kind, 0, errno.EIO)
    options = StoreOptions(io=io, checkpoint_seconds=0, journal_limit=100_000)
    store = EventStore.open(path, expected=IDENTITY, options=options)
    descriptors = _descriptors()
    with h5py.File(path, "r"):
        with pytest.raises(CorpusIOError, match=r"cannot replace 00\.h5\.wal: Input/output error"):
            _commit_and_checkpoint(store, 1000)
        assert _descriptors() == descriptors + 1  # the reader's
        committed = store.committed
        assert not path.with_name("00.h5.wal.new").exists()
        store.abandon()
        with EventStore.open(path, expected=IDENTITY) as store:
            assert store.committed == committed
    EventStore.open(path, expected=IDENTITY).close()
    assert (committed, expected(committed)) == stock_contents(path)


@pytest.mark.parametrize("refusal", [RuntimeError("can't start new thread"), MemoryError()])
def test_a_checkpoint_without_a_thread_is_transient_and_lets_readers_in(
    path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Exception
) -> None:
    """Nothing is copied, so readers are let in."""
    store = EventStore.open(path, expected=IDENTITY)
    commit_range(store, range(1, 101))
    with monkeypatch.context() as broken:
        broken.setattr(threading.Thread, "start", _raising(refusal))
        with pytest.raises(CorpusIOError, match=r"cannot checkpoint 00\.h5: (can't start|out of memory)"):
            store.maybe_checkpoint(now=True)
    assert stock_contents(path) == (0, {})
    store.abandon()
    EventStore.open(path, expected=IDENTITY).close()
    assert (100, expected(100)) == stock_contents(path)


def test_a_checkpoint_without_memory_is_transient(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is as good as its journal; the next store goes on."""
    store = EventStore.open(path, expected=IDENTITY)
    commit_range(store, range(1, 101))
    with monkeypatch.context() as broken:
        broken.setattr("fiq.corpus.wal.checkpoint.Checkpoint._copy_images", _raising(MemoryError()))
        with pytest.raises(CorpusIOError, match=r"cannot checkpoint 00\.h5: out of memory"):
            store.checkpoint()
    store.abandon()
    EventStore.open(path, expected=IDENTITY).close()
    assert (100, expected(100)) == stock_contents(path)


def test_a_compaction_without_a_thread_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commits go on in the old journal, and no descriptor stays open."""
    options = StoreOptions(checkpoint_seconds=0, journal_limit=100_000)
    with EventStore.open(path, expected=IDENTITY, options=options) as store, h5py.File(path, "r"):
        monkeypatch.setattr(threading.Thread, "start", _raising(RuntimeError("can't start new thread")))
        descriptors = _descriptors()
        _commit_and_checkpoint(store, 100)
        assert store.stats.journal_bytes > 100_000
        assert _descriptors() == descriptors
    assert (100, expected(100)) == stock_contents(path)


def _commit_and_checkpoint(store: EventStore, last: int) -> None:
    for number in range(1, last + 1):
        commit_range(store, range(number, number + 1))
        store.maybe_checkpoint(now=True)


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _raising(error: Exception) -> Callable[..., None]:
    def refuse(*_: object) -> None:
        raise error

    return refuse


def _commit_on_and_on(store: EventStore) -> None:
    for start in range(101, 1001, 10):
        commit_range(store, range(start, start + 10))


def _committed(path: Path) -> int:
    try:
        return stock_contents(path)[0]
    except OSError:
        return -1
