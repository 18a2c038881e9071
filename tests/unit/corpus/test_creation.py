"""Creating a partition file: whole, or not at all. And whose file it is."""

from __future__ import annotations

import errno
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from fiq.corpus import (
    CorpusError,
    CorpusExistsError,
    CorpusIOError,
    CorpusNotFoundError,
    EventStore,
    IdentityMismatchError,
    StorageIO,
    StoreOptions,
)
from tests.support.corpus import IDENTITY, commit_range, expected, stock_contents
from tests.support.faulty_io import FailingIO


class _DyingIO(StorageIO):
    """Dies, as a killed process does, instead of a certain call."""

    def __init__(self, calls: int) -> None:
        self._left = calls

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt

    def pwrite(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> int:
        self._count()
        return super().pwrite(fd, data, offset)

    def fsync(self, fd: int) -> None:
        self._count()
        super().fsync(fd)

    def rename(self, source: Path, target: Path) -> None:
        self._count()
        super().rename(source, target)

    def sync_directory(self, directory: Path) -> None:
        self._count()
        super().sync_directory(directory)


def test_a_new_file_is_empty_and_for_its_group_only(tmp_path: Path) -> None:
    """Owner and group may read it: payloads are medical data."""
    path = tmp_path / "00.h5"
    with EventStore.create(path, IDENTITY) as store:
        assert (store.committed, store.identity) == (0, IDENTITY)
    assert stock_contents(path) == (0, {})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["00.h5", "00.h5.wal"]
    assert [file.stat().st_mode & 0o777 for file in tmp_path.iterdir()] == [0o640] * 2


def test_an_existing_file_is_never_replaced(path: Path) -> None:
    """Its events would be lost."""
    with EventStore.open(path, expected=IDENTITY) as store:
        commit_range(store, range(1, 11))
    with pytest.raises(CorpusExistsError, match=r"00\.h5 exists"):
        EventStore.create(path, IDENTITY)
    assert (10, expected(10)) == stock_contents(path)


def test_a_creation_cut_short_anywhere_leaves_nothing_or_a_whole_file(tmp_path: Path) -> None:
    """A second creation finishes what a crash left, unless the file is complete; no temporary file stays."""
    for calls in range(100):
        path = tmp_path / f"{calls:02d}.h5"
        try:
            EventStore.create(path, IDENTITY, StoreOptions(io=_DyingIO(calls))).close()
        except KeyboardInterrupt:
            if not path.exists():
                with pytest.raises(CorpusError):
                    EventStore.open(path, expected=IDENTITY)
                EventStore.create(path, IDENTITY).close()
        else:
            assert calls == 8
            break
        EventStore.open(path, expected=IDENTITY).close()
        assert stock_contents(path) == (0, {})
        assert not list(tmp_path.glob("*.new"))


def test_a_creation_on_a_full_disk_is_transient(tmp_path: Path) -> None:
    """It works when there is room."""
    path = tmp_path / "00.h5"
    with pytest.raises(CorpusIOError, match=r"cannot create 00\.h5: No space left on device"):
        EventStore.create(path, IDENTITY, StoreOptions(io=FailingIO("pwrite", 1, errno.ENOSPC)))
    EventStore.create(path, IDENTITY).close()


def test_a_file_or_directory_that_is_missing_is_named(tmp_path: Path) -> None:
    """open() creates nothing."""
    with pytest.raises(CorpusNotFoundError, match=r"there is no partition file 00\.h5"):
        EventStore.open(tmp_path / "00.h5", expected=None)
    with pytest.raises(CorpusNotFoundError, match="there is no directory"):
        EventStore.create(tmp_path / "missing" / "00.h5", IDENTITY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field", [field.name for field in fields(IDENTITY)])
def test_a_file_of_another_identity_is_refused(path: Path, field: str) -> None:
    """The error names the field, both values and what to do; the file is released and unchanged."""
    found = getattr(IDENTITY, field)
    wanted = found + 1 if isinstance(found, int) else "another"
    changes: dict[str, Any] = {field: wanted}
    before = path.read_bytes()
    with pytest.raises(
        IdentityMismatchError, match=rf"{field} is '?{found}'? in the file but '?{wanted}'? is"
    ) as raised:
        EventStore.open(path, expected=replace(IDENTITY, **changes))
    assert (field, wanted, found) == (raised.value.field, raised.value.expected, raised.value.found)
    assert before == path.read_bytes()
    EventStore.open(path, expected=None).close()
