"""A disk that is full or broken: the store fails clearly, and what was committed is safe."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from fiq.corpus import CorpusIOError, EventStore, StoreFailedError, StoreOptions
from fiq.corpus.wal.pages import PageCache
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
