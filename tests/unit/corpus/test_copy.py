"""Copies of a live pair: exactly a commit, whole, and never to be confused with the original."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from fiq.corpus import (
    CorpusExistsError,
    CorpusIOError,
    EventStore,
    JournalError,
    StorageIO,
    StoreOptions,
    open_corpus,
    repack,
    verify_corpus,
)
from fiq.corpus.errors import ArchivedFileError
from fiq.corpus.tools.copy import copy_pair
from tests.support.corpus import IDENTITY, append_range, commit_range, expected, stock_contents


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Where the original will be."""
    (tmp_path / "live").mkdir()
    return tmp_path / "live" / "00.h5"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where the copy will be."""
    (tmp_path / "copy").mkdir()
    return tmp_path / "copy" / "00.h5"


def test_a_copy_holds_the_last_commit_though_only_the_journal_has_it(source: Path, target: Path) -> None:
    """Also for stock h5py: the journal's commits are in the file. A batch that is not committed is not."""
    with EventStore.create(source, IDENTITY) as store:
        commit_range(store, range(1, 101))
        store.checkpoint()
        commit_range(store, range(101, 151))
        append_range(store, range(151, 171))
        copy_pair(source, target)
        store.commit(170)
    assert (150, expected(150)) == stock_contents(target)
    with open_corpus(target) as corpus:
        (info,) = corpus.partitions
    assert (150, True, 0) == (info.committed, info.has_journal, info.journal_records)
    assert (170, expected(170)) == stock_contents(source)


def test_a_writer_goes_on_from_a_copy(source: Path, target: Path) -> None:
    """As from a file that was closed; what the original's writer does meanwhile changes nothing in it."""
    with EventStore.create(source, IDENTITY) as store:
        commit_range(store, range(1, 101))
        copy_pair(source, target)
        commit_range(store, range(101, 301))
        store.checkpoint()
    with EventStore.open(target, expected=IDENTITY) as copy:
        assert 100 == copy.committed
        commit_range(copy, range(101, 201))
    assert (200, expected(200)) == stock_contents(target)
    assert verify_corpus(target.parent).clean


@pytest.mark.parametrize("keep", ["00.h5", "00.h5.wal"])
def test_a_half_of_a_copy_beside_the_other_half_of_the_original_is_refused(
    source: Path, target: Path, keep: str
) -> None:
    """Restoring only one of the two files is refused: both histories went on since."""
    with EventStore.create(source, IDENTITY) as store:
        commit_range(store, range(1, 101))
        copy_pair(source, target)
        commit_range(store, range(101, 201))
        store.checkpoint()
        commit_range(store, range(201, 301))
        store.abandon()
    shutil.copy(source.with_name(keep), target.with_name(keep))
    with pytest.raises(JournalError):
        EventStore.open(target, expected=IDENTITY)


def test_a_copy_of_what_a_crash_left_is_whole(source: Path, target: Path) -> None:
    """Without a writer the journal stays as it is; the copy needs none of it."""
    store = EventStore.create(source, IDENTITY)
    for start in range(1, 301, 50):
        commit_range(store, range(start, start + 50))
    store.abandon()
    before = {path.name: path.read_bytes() for path in source.parent.iterdir()}
    copy_pair(source, target)
    assert (300, expected(300)) == stock_contents(target)
    assert before == {path.name: path.read_bytes() for path in source.parent.iterdir()}


def test_progress_rises_to_one(source: Path, target: Path) -> None:
    """The fraction of the file's bytes."""
    with EventStore.create(source, IDENTITY) as store:
        commit_range(store, range(1, 10_001), consultations=1500)
    reported: list[float] = []
    copy_pair(source, target, on_progress=reported.append)
    assert len(reported) > 1
    assert sorted(reported) == reported
    assert 1.0 == reported[-1]


@pytest.mark.parametrize("name", ["00.h5", "00.h5.wal"])
def test_nothing_is_overwritten(source: Path, target: Path, name: str) -> None:
    """Neither a partition file nor a journal, which may hold commits."""
    EventStore.create(source, IDENTITY).close()
    target.with_name(name).write_bytes(b"precious")
    with pytest.raises(CorpusExistsError):
        copy_pair(source, target)
    assert b"precious" == target.with_name(name).read_bytes()
    assert [name] == [path.name for path in target.parent.iterdir()]


def test_a_file_without_its_journal_is_refused(source: Path, target: Path) -> None:
    """A new empty journal in the copy would hide that commits are lost."""
    EventStore.create(source, IDENTITY).close()
    source.with_name("00.h5.wal").unlink()
    with pytest.raises(JournalError, match=r"00\.h5 has no journal"):
        copy_pair(source, target)
    assert [] == [path.name for path in target.parent.iterdir()]


def test_an_archive_is_refused(source: Path, target: Path) -> None:
    """It has no journal by design, and a writer must not get one for it."""
    EventStore.create(source, IDENTITY).close()
    archive = source.with_name("01.h5")
    repack(source, archive)
    with pytest.raises(ArchivedFileError):
        copy_pair(archive, target)


class _FullDisk(StorageIO):
    def pwrite(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_told_and_lets_the_writer_go_on(source: Path, target: Path) -> None:
    """The lock on the original is gone with the error: its next checkpoint does not wait."""
    with EventStore.create(source, IDENTITY, StoreOptions()) as store:
        commit_range(store, range(1, 51))
        with pytest.raises(CorpusIOError, match=r"cannot copy 00\.h5: No space left"):
            copy_pair(source, target, io=_FullDisk())
        assert store.checkpoint()
