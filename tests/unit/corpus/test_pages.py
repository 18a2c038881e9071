"""The pages over a file, and the index of what only the journal holds."""

from __future__ import annotations

import os
import random
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fiq.corpus.wal.file import PageCache
from fiq.corpus.wal.journal import SECTOR, Extents, SectorIndex, Sectors, runs_of
from fiq.corpus.wal.storage import Buffer


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 80)
    fd = os.open(tmp_path / "file", os.O_RDWR)
    yield fd
    os.close(fd)


def _content(cache: PageCache) -> bytes:
    buffer = bytearray(cache.size)
    cache.read_into(0, memoryview(buffer))
    return bytes(buffer)


def _bit_by_bit(cache: PageCache, start: int, lengths: Iterable[int]) -> bytes:
    """Read as HDF5 does: little at a time, neighbours one after another."""
    parts = []
    for length in lengths:
        parts.append(bytearray(length))
        cache.read_into(start, memoryview(parts[-1]))
        start += length
    return b"".join(parts)


class _Images:
    """A journal of nothing but images, and the index of what it holds."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._extents: list[Extents] = []

    def take(self, table: Sectors, images: Iterable[Buffer]) -> None:
        self._extents.append(Extents(table, os.fstat(self.fd).st_size))
        for image in images:
            os.pwrite(self.fd, image, os.fstat(self.fd).st_size)

    @property
    def records(self) -> int:
        return len(self._extents)

    def index(self, since: int = 0) -> SectorIndex:
        return SectorIndex.of(self._extents[since:])


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[_Images]:
    fd = os.open(tmp_path / "images", os.O_RDWR | os.O_CREAT)
    yield _Images(fd)
    os.close(fd)


def test_an_cache_behaves_like_a_file_in_memory(fd: int, journal: _Images) -> None:
    """Writes, shrinks, growths, commits, rollbacks, checkpoints and full memory against a plain bytearray."""
    chance = random.Random(3)
    size = os.fstat(fd).st_size
    cache = PageCache(fd, journal.fd, size, SectorIndex.of(()))
    model = bytearray(os.pread(fd, size, 0))
    committed = bytes(model)
    sealed: tuple[bytes, int] | None = None
    for step in range(1500):
        action = chance.random()
        if action < 0.7:
            offset, data = chance.randrange(len(model) + 3000), chance.randbytes(chance.randrange(1, 9000))
            cache.write(offset, data)
            model.extend(bytes(max(0, offset + len(data) - len(model))))
            model[offset : offset + len(data)] = data
        elif action < 0.85:
            size = chance.randrange(1, len(model) + 5000)
            cache.truncate(size)
            del model[size:]
            model.extend(bytes(size - len(model)))
        elif action < 0.93:
            journal.take(*cache.changes())
            cache.commit()
            committed = bytes(model)
        elif action < 0.95 and sealed is None:
            cache.seal()
            sealed = committed, journal.records
        elif action < 0.95 and sealed is not None:
            os.pwrite(fd, sealed[0], 0)
            os.ftruncate(fd, len(sealed[0]))
            cache.drop_sealed(journal.index(since=sealed[1]))
            sealed = None
        elif action < 0.97:
            # in the middle of a batch, as when a compacted journal takes the old one's place
            cache.rebase(journal.index())
        else:
            cache.rollback(journal.index())
            model = bytearray(committed)
        start = chance.randrange(len(model))
        lengths = [chance.randrange(1, 600) for _ in range(8)]
        assert bytes(model[start:]).ljust(sum(lengths), b"\0")[: sum(lengths)] == _bit_by_bit(cache, start, lengths)
        if step % 25 == 0:
            assert bytes(model) == _content(cache)


def test_only_the_sectors_that_differ_are_changes(fd: int) -> None:
    """HDF5 rewrites whole chunks; the journal takes what is new in them."""
    cache = PageCache(fd, fd, os.fstat(fd).st_size, SectorIndex.of(()))
    cache.write(1024, os.pread(fd, 4096, 1024))
    cache.write(5 * SECTOR + 7, b"!")
    cache.write(6 * SECTOR, b"!")
    cache.write(20 * SECTOR, b"!")
    table, images = cache.changes()
    assert table.tolist() == [[5, 2], [20, 1]]
    content = b"".join(map(bytes, images))
    assert len(content) == 3 * SECTOR
    assert content[7:8] == b"!"


def test_a_shrink_is_journaled_as_zeros(fd: int) -> None:
    """A later growth over the cut must find zeros, also after a recovery that applies both."""
    cache = PageCache(fd, fd, os.fstat(fd).st_size, SectorIndex.of(()))
    os.pwrite(fd, b"\1" * os.fstat(fd).st_size, 0)
    cache.truncate(100)
    table, images = cache.changes()
    assert table.tolist() == [[0, 40]]
    assert bytes(40 * SECTOR - 100) == b"".join(map(bytes, images))[100:]


def test_the_newest_image_of_a_sector_counts(tmp_path: Path) -> None:
    """Of records that change the same sectors the last one is seen, whole or in part."""
    journal = tmp_path / "journal"
    journal.write_bytes(b"".join(bytes([n]) * SECTOR for n in range(10)))
    older = Extents(np.array([[2, 3], [9, 1]], np.uint64), images=0)
    newer = Extents(np.array([[3, 1], [5, 1]], np.uint64), images=5 * SECTOR)
    index = SectorIndex.of([older, newer])
    buffer = bytearray(b"\xff" * (SECTOR * 5))
    fd = os.open(journal, os.O_RDONLY)
    index.patch(fd, SECTOR * 2 - 10, memoryview(buffer))
    runs = [
        (offset // SECTOR, [content[n] for n in range(0, len(content), SECTOR)]) for offset, content in index.runs(fd)
    ]
    os.close(fd)
    assert [buffer[place] for place in (0, 10, 10 + SECTOR, 10 + 2 * SECTOR, 10 + 3 * SECTOR)] == [0xFF, 0, 5, 2, 6]
    assert runs == [(2, [0, 5, 2, 6]), (9, [3])]


def test_neighbours_are_read_at_once(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The headers and chunks of a consultation are neighbours; on a cold disk each read of its own waits for it."""
    cache = PageCache(fd, fd, os.fstat(fd).st_size, SectorIndex.of(()))
    reads: list[int] = []
    system = os.preadv

    def counted(*arguments: Any) -> int:
        reads.append(system(*arguments))
        return reads[-1]

    monkeypatch.setattr(os, "preadv", counted)
    _bit_by_bit(cache, 4200, [512] * 8)
    cache.write(9000, b"!")
    assert [16 << 10] == reads


def test_a_look_into_the_index_does_not_copy_it(fd: int) -> None:
    """It is looked into for every page that is read: what that costs must not grow with the journal."""
    sectors = np.arange(0, 2_000_000, 2, dtype=np.uint64)
    index = SectorIndex(sectors, np.zeros(len(sectors), np.uint64))
    buffer = memoryview(bytearray(4096))
    tracemalloc.start()
    index.patch(fd, 4096 * 1000, buffer)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


def test_an_index_grows_by_what_is_newer() -> None:
    """Built step by step it is the one that is built at once, whatever the records have in common."""
    chance = random.Random(4)
    records = []
    for number in range(30):
        sectors = np.array(sorted(chance.sample(range(300), 40)), np.uint64)
        records.append(Extents(runs_of(sectors), images=number * 40 * SECTOR))
    at_once, grown, start = SectorIndex.of(records), SectorIndex.of(()), 0
    while start < len(records):
        step = chance.randrange(4)
        grown = grown.with_newer(records[start : start + step])
        start += step
    assert at_once.table().tolist() == grown.table().tolist()
    assert at_once.offsets.tolist() == grown.offsets.tolist()
