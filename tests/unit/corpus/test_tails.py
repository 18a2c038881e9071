"""What is added to a chunk goes to its place in the file, past HDF5: the place must be the right one."""

from __future__ import annotations

from pathlib import Path

import pytest

from fiq.corpus import CorpusFormatError, EventStore
from fiq.corpus.wal.atomic_file import FileObject
from fiq.corpus.wal.overlay import PageOverlay, SectorIndex
from tests.support.corpus import IDENTITY, commit_range, expected, stock_contents


def test_batches_of_any_size_come_out_as_they_went_in(path: Path) -> None:
    """They end within chunks, at their ends, and go over several."""
    start = 1
    with EventStore.open(path, expected=IDENTITY) as store:
        for size in (1, 31, 1, 32, 64, 63, 1, 200, 500):
            commit_range(store, range(start, start + size), consultations=1)
            start += size
    assert (start - 1, expected(start - 1, consultations=1)) == stock_contents(path)


def test_the_place_of_a_chunk_is_the_one_that_hdf5_tells(path: Path) -> None:
    """Its own function for that goes through all chunks of a dataset, so it is only asked here."""
    with EventStore.open(path, expected=IDENTITY) as store:
        commit_range(store, range(1, 301), consultations=2)
        for appender in store._partition.consultations._open.values():
            tail = appender._payload
            first = tail.length - 1 - (tail.length - 1) % 4096
            told = tail._dataset.get_chunk_info_by_coord((first,)).byte_offset
            assert told == tail._place


def test_the_content_of_a_chunk_is_not_read_to_find_its_place(path: Path) -> None:
    """Only its place counts: on a cold disk the reads are what a consultation that is opened again costs."""
    with path.open("rb") as file:
        content = FileObject("00.h5", PageOverlay(file.fileno(), file.fileno(), 4096, SectorIndex.of(())))
        read: list[bytes] = []

        def chunk() -> None:
            content.seek(256)
            read.append(content.read(512))
            content.seek(512)
            read.append(content.read(1024))

        assert content.locate(chunk, 1024) == 512
        assert [path.read_bytes()[256:768], bytes(1024)] == read
        assert path.read_bytes()[512:1536] == content.peek(512, 1024)


def test_a_read_of_something_else_is_no_place(path: Path) -> None:
    """What HDF5 does inside must be what is expected of it; else nothing is written."""
    with path.open("rb") as file:
        content = FileObject("00.h5", PageOverlay(file.fileno(), file.fileno(), 4096, SectorIndex.of(())))
        with pytest.raises(CorpusFormatError, match="read 100 bytes instead of a chunk of 4096"):
            content.locate(lambda: content.read(100), 4096)
