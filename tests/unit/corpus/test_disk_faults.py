"""A disk that is full or broken: the store fails clearly, and what was committed is safe."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from fiq.corpus import CorpusIOError, EventStore, StoreFailedError, StoreOptions, open_corpus
from fiq.corpus.store import ConsultationGroups
from fiq.corpus.wal.file import PageCache
from fiq.corpus.wal.recovery import Snapshot
from tests.support.corpus import IDENTITY, append_range, commit_range, expected, stock_contents
from tests.support.faulty_io import FailingIO

_BATCH = 25
_LAST = 200


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize(
    ("kind", "partly"),
    [
        ("pwrite", False),
        ("pwrite", True),
        ("fdatasync", False),
        ("fsync", False),
        ("truncate", False),
        ("allocate", False),
        ("reserve", False),
    ],
)
def test_any_call_may_fail_and_nothing_committed_is_lost(path: Path, kind: str, code: int, *, partly: bool) -> None:
    """Each call of a kind fails in its turn; after abandon and reopen the work goes on to the same end."""
    for after in range(0, 1000, 1 if kind != "pwrite" else 5):
        io = FailingIO(kind, after, code, partly=partly)
        _remake(path)
        acknowledged = _work_until_a_failure(path, io)
        if not io.failed:
            return
        with EventStore.open(path, expected=IDENTITY) as store:
            assert store.committed in (acknowledged, acknowledged + _BATCH)
            for start in range(store.committed + 1, _LAST, _BATCH):
                commit_range(store, range(start, start + _BATCH))
        assert (_LAST, expected(_LAST)) == stock_contents(path)
    pytest.fail("the failure never stopped coming")


def test_a_full_disk_is_a_transient_error_that_says_what_happened(path: Path) -> None:
    """The operator reads the operation, the file and the system's reason; the store then refuses to go on."""
    store = EventStore.open(path, expected=IDENTITY, options=StoreOptions(io=FailingIO("pwrite", 0, errno.ENOSPC)))
    with pytest.raises(CorpusIOError, match=r"cannot commit to 00\.h5\.wal: No space left on device"):
        commit_range(store, range(1, 11))
    with pytest.raises(StoreFailedError):
        append_range(store, range(11, 21))
    store.abandon()
    assert stock_contents(path) == (0, {})


def test_a_checkpoint_without_room_waits_and_changes_nothing(path: Path) -> None:
    """The growth is reserved before the first byte is copied, so a full disk finds the file as it was."""
    store = EventStore.open(path, expected=IDENTITY, options=StoreOptions(io=FailingIO("allocate", 0, errno.ENOSPC)))
    before = path.read_bytes()
    commit_range(store, range(1, 101))
    reserved = path.stat().st_blocks
    assert not store.checkpoint()
    assert path.stat().st_blocks == reserved
    assert (
        store.stats.checkpoints_deferred,
        store.stats.checkpoint_deferred_because,
    ) == (1, "the disk has no room for it")
    assert before == path.read_bytes()
    commit_range(store, range(101, 201))
    assert store.checkpoint()
    store.close()
    assert (200, expected(200)) == stock_contents(path)


def test_a_disk_that_cannot_be_read_is_an_io_error_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HDF5 hides what its file object raised; the store reports it."""
    with EventStore.open(path, expected=IDENTITY) as store:
        commit_range(store, range(1, 101))
    store = EventStore.open(path, expected=IDENTITY)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(PageCache, "read_into", fail)
        with pytest.raises(CorpusIOError, match="Input/output error"):
            append_range(store, range(101, 201))
        store.abandon()
    with EventStore.open(path, expected=IDENTITY) as store:
        commit_range(store, range(101, 201))
    assert (200, expected(200)) == stock_contents(path)


def test_a_path_that_cannot_be_looked_at_is_an_io_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is gone is an answer; a system that refuses one is an error."""
    store = EventStore.open(path, expected=IDENTITY)

    def refuse(_: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "stat", refuse)
        with pytest.raises(CorpusIOError, match=r"cannot look for 00\.h5: Permission denied"):
            _ = store.in_place
    before = store.in_place
    path.unlink()
    assert (before, store.in_place) == (True, False)
    store.abandon()


def _remake(path: Path) -> None:
    for file in (path, path.with_name(path.name + ".wal")):
        file.unlink()
    EventStore.create(path, IDENTITY).close()


def _work_until_a_failure(path: Path, io: FailingIO) -> int:
    """Return the sequence that was acknowledged last."""
    acknowledged = 0
    try:
        store = EventStore.open(path, expected=IDENTITY, options=StoreOptions(checkpoint_bytes=60_000, io=io))
    except CorpusIOError:
        return acknowledged
    try:
        for start in range(1, _LAST, _BATCH):
            commit_range(store, range(start, start + _BATCH))
            acknowledged = store.committed
            store.maybe_checkpoint()
        store.close()
    except CorpusIOError:
        store.abandon()
    return acknowledged


@pytest.mark.parametrize("call", ["read_into", "write", "truncate"])
def test_a_lack_of_memory_in_a_call_of_hdf5_is_transient(
    path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HDF5 reports only that its file failed; that must not look like a damaged file, which stops a partition."""
    with EventStore.open(path, expected=IDENTITY) as store:
        commit_range(store, range(1, 101))
    store = EventStore.open(path, expected=IDENTITY, options=StoreOptions(open_consultations=1))
    original, calls = getattr(PageCache, call), 0

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError
        return original(*args)

    def work() -> None:
        for start in range(101, 1000, 25):
            commit_range(store, range(start, start + 25))

    with monkeypatch.context() as patched:
        patched.setattr(PageCache, call, failing)
        with pytest.raises(CorpusIOError, match="out of memory"):
            work()
    assert calls >= 2
    committed = store.committed
    store.abandon()
    with EventStore.open(path, expected=IDENTITY) as store:
        assert store.committed == committed
        commit_range(store, range(committed + 1, committed + 26))
    assert (committed + 25, expected(committed + 25)) == stock_contents(path)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("Unable to open (memory allocation failed for block)")])
def test_a_lack_of_memory_in_hdf5_itself_is_transient(
    path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In appends, in commits, and in what is read between them."""

    def fail(*_: object) -> None:
        raise error

    store = EventStore.open(path, expected=IDENTITY)
    monkeypatch.setattr(ConsultationGroups, "consultation", fail)
    with pytest.raises(CorpusIOError, match="out of memory"), store.reading() as lookup:
        lookup.consultation("c-0001")
    commit_range(store, range(1, 11))
    monkeypatch.setattr(ConsultationGroups, "append", fail)
    with pytest.raises(CorpusIOError, match="out of memory"):
        commit_range(store, range(11, 21))
    store.abandon()


def test_a_reader_without_memory_does_not_take_the_file_for_damaged(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its calls come from HDF5 as well."""
    with EventStore.open(path, expected=IDENTITY) as store:
        commit_range(store, range(1, 101))

    def fail(*_: object) -> None:
        raise MemoryError

    with open_corpus(path) as corpus:
        assert 7 == len(corpus)
        monkeypatch.setattr(Snapshot, "_fill", fail)
        with pytest.raises(CorpusIOError, match=r"cannot read 00\.h5: out of memory"):
            list(corpus["c-0001"])
