"""corpus.h5: one file through which stock tools open the whole corpus."""

from __future__ import annotations

import errno
from pathlib import Path

import h5py
import pytest

from fiq.corpus import CorpusIOError, CorpusNotFoundError, EventStore, Record, write_index
from tests.support.corpus import IDENTITY
from tests.support.faulty_io import FailingIO


def _partition(directory: Path, number: int) -> None:
    with EventStore.create(directory / f"{number:02d}.h5", IDENTITY) as store:
        store.append(f"c-{number}", [Record(1, 0, 2, bytes(16), b"{}")])
        store.commit(1)


def test_the_index_opens_every_partition(tmp_path: Path) -> None:
    """Links are relative: the directory may be moved."""
    directory = tmp_path / "corpus"
    directory.mkdir()
    for number in (0, 5, 12):
        _partition(directory, number)
    write_index(directory)
    moved = directory.rename(tmp_path / "moved")
    with h5py.File(moved / "corpus.h5", "r") as index:
        assert list(index["partitions"]) == ["00", "05", "12"]
        assert len(index["partitions/05/consultations/c-5/events"]) == 1
        assert index["partitions"].get("05", getlink=True).filename == "05.h5"


def test_a_new_index_replaces_the_old_one(tmp_path: Path) -> None:
    """Written when a partition is created; readers of the old one are not disturbed."""
    _partition(tmp_path, 0)
    write_index(tmp_path)
    with h5py.File(tmp_path / "corpus.h5", "r") as old:
        _partition(tmp_path, 1)
        write_index(tmp_path)
        assert list(old["partitions"]) == ["00"]
    with h5py.File(tmp_path / "corpus.h5", "r") as new:
        assert list(new["partitions"]) == ["00", "01"]
    assert (tmp_path / "corpus.h5").stat().st_mode & 0o777 == 0o640


def test_an_index_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    """The new one is written to a temporary file and renamed."""
    _partition(tmp_path, 0)
    write_index(tmp_path)
    before = (tmp_path / "corpus.h5").read_bytes()
    _partition(tmp_path, 1)
    with pytest.raises(CorpusIOError, match=r"cannot write corpus\.h5: No space left"):
        write_index(tmp_path, FailingIO("pwrite", 0, errno.ENOSPC))
    assert before == (tmp_path / "corpus.h5").read_bytes()
    assert not (tmp_path / "corpus.h5.new").exists()


def test_an_index_that_is_right_stays(tmp_path: Path) -> None:
    """Nothing is written; a damaged one is replaced."""
    _partition(tmp_path, 0)
    write_index(tmp_path)
    index = tmp_path / "corpus.h5"
    before = index.stat().st_ino
    write_index(tmp_path, FailingIO("pwrite", 0, errno.ENOSPC))
    assert before == index.stat().st_ino
    index.write_bytes(b"damaged")
    write_index(tmp_path)
    with h5py.File(index, "r") as new:
        assert list(new["partitions"]) == ["00"]


def test_an_index_of_a_missing_directory_is_refused(tmp_path: Path) -> None:
    """Nothing is created."""
    with pytest.raises(CorpusNotFoundError):
        write_index(tmp_path / "missing")
