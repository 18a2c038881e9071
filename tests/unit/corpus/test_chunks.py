"""What is added to a chunk goes to its place in the file, past HDF5: the place must be the right one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fiq.corpus import CorpusFormatError, EventStore
from fiq.corpus.wal.file import AtomicFile
from tests.support.corpus import IDENTITY, commit_range, expected, stock_contents


@pytest.fixture
def file(path: Path) -> Iterator[AtomicFile]:
    file = AtomicFile(path)
    yield file
    file.close()


def test_batches_of_any_size_come_out_as_they_went_in(path: Path) -> None:
    """They end within chunks, at their ends, and go over several."""
    start = 1
    with EventStore.open(path, expected=IDENTITY) as store:
        for size in (1, 31, 1, 32, 64, 63, 1, 200, 500):
            commit_range(store, range(start, start + size), consultations=1)
            start += size
    assert (start - 1, expected(start - 1, consultations=1)) == stock_contents(path)


def test_the_place_of_a_chunk_is_the_one_that_hdf5_states(path: Path) -> None:
    """Its own function for that goes through all chunks of a dataset, so it is only asked here."""
    with EventStore.open(path, expected=IDENTITY) as store:
        commit_range(store, range(1, 301), consultations=2)
        for appender in store._partition.consultations._open.values():
            tail = appender._payload
            first = tail.length - 1 - (tail.length - 1) % tail._chunk
            stated = tail._dataset.get_chunk_info_by_coord((first,)).byte_offset
            assert stated == tail._offset


def test_a_read_is_located_and_returns_what_is_there(file: AtomicFile, path: Path) -> None:
    """The last of several reads is the one that counts, and each gets the true content, whatever its length."""
    read: list[bytes] = []

    def chunk() -> None:
        for place, length in ((4096, 1024), (256, 512), (512, 1024)):
            file.seek(place)
            read.append(file.read(length))

    assert 512 == file.locate(chunk, 1024)
    content = path.read_bytes()
    assert [content[4096:5120], content[256:768], content[512:1536]] == read


def test_a_read_past_the_end_is_zeros_and_one_before_it_is_not(file: AtomicFile) -> None:
    """HDF5 reads what it has allocated and not written: whatever was written is there, and all the rest is zeros."""
    end = file.seek(0, 2)
    file.seek(end - 4)
    file.write(b"\xff" * 4)
    file.write_at(end + 10_000, b"\xee")
    file.seek(end - 4)
    assert b"\xff" * 4 + bytes(10_000) + b"\xee" + bytes(20_000) == file.read(30_005)


def test_a_read_after_the_close_is_an_error(file: AtomicFile) -> None:
    """The descriptor may be another file's by then; zeros would be taken for content."""
    file.close()
    with pytest.raises(OSError, match="closed"):
        file.read(100)


def test_a_read_of_something_else_is_no_place(file: AtomicFile) -> None:
    """What HDF5 does inside must be what is expected of it; else nothing is written."""
    with pytest.raises(CorpusFormatError, match="read 100 bytes instead of a chunk of 4096"):
        file.locate(lambda: file.read(100), 4096)
