"""The journal: what recovery takes from it, and which journals are refused."""

from __future__ import annotations

import shutil
import zlib
from functools import partial
from pathlib import Path

import pytest

from fiq.corpus import CorpusFormatError, CorpusNotFoundError, EventStore, JournalError, StoreOptions, open_corpus
from tests.support.corpus import IDENTITY, commit_range, expected, stock_contents
from tests.support.polling import eventually_sync

_FIRST_RECORD = 8192


@pytest.fixture
def wal(path: Path) -> Path:
    return path.with_name(path.name + ".wal")


@pytest.fixture
def crashed(path: Path) -> Path:
    """A file whose three commits, up to the sequence 30, are in the journal only."""
    _crash_after(path, 3)
    return path


def test_commits_that_only_the_journal_holds_are_recovered(crashed: Path) -> None:
    """A crash before the first checkpoint loses nothing; stock h5py opens the file once the store was open again."""
    assert stock_contents(crashed) == (0, {})
    with EventStore.open(crashed, expected=IDENTITY) as store:
        assert (store.committed, store.stats.records_recovered) == (30, 3)
        assert (30, expected(30)) == stock_contents(crashed)


@pytest.mark.parametrize("cut", [1, 500, 4096, 5000])
def test_a_torn_tail_is_dropped(crashed: Path, wal: Path, cut: int) -> None:
    """The last record, cut short by a crash, was never acknowledged."""
    with wal.open("r+b") as file:
        file.truncate(_last_record(wal) + cut)
    with EventStore.open(crashed, expected=IDENTITY) as store:
        assert store.committed == 20
        commit_range(store, range(21, 41))
    assert (40, expected(40)) == stock_contents(crashed)


def test_a_bit_flipped_in_the_last_record_drops_it(crashed: Path, wal: Path) -> None:
    """A damaged tail and a torn one look the same."""
    _flip(wal, _last_record(wal) + 700)
    with EventStore.open(crashed, expected=IDENTITY) as store:
        assert (store.committed, store.stats.torn_records) == (20, 1)
    assert (20, expected(20)) == stock_contents(crashed)


@pytest.mark.parametrize("place", [_FIRST_RECORD, _FIRST_RECORD + 20, _FIRST_RECORD + 80, _FIRST_RECORD + 1500])
def test_a_bit_flipped_before_the_last_record_is_refused_loudly(crashed: Path, wal: Path, place: int) -> None:
    """Records after it were acknowledged: the journal is never shortened silently. Readers refuse it too."""
    _flip(wal, place)
    with pytest.raises(JournalError, match="restore the file and its journal from a backup"):
        EventStore.open(crashed, expected=IDENTITY)
    with open_corpus(crashed) as corpus, pytest.raises(JournalError):
        len(corpus)


@pytest.mark.parametrize("slot", ["older", "newest"])
@pytest.mark.parametrize("checkpoints", [2, 3])
def test_one_damaged_header_is_survived(path: Path, wal: Path, checkpoints: int, slot: str) -> None:
    """Two headers are written in turn; a power cut may destroy the one that is being written.

    The older one leads to the records of the round before: they are there until their room is used again.
    """
    _checkpoints_and_a_commit(path, checkpoints, each=10)
    _flip(wal, _slots(wal)[slot] + 40)
    with open_corpus(path) as corpus:
        assert corpus.partitions[0].committed == 10 * checkpoints + 10
    with EventStore.open(path, expected=IDENTITY) as store:
        assert store.committed == 10 * checkpoints + 10
    assert (10 * checkpoints + 10, expected(10 * checkpoints + 10)) == stock_contents(path)


def test_a_damaged_newest_header_is_refused_once_the_room_of_the_round_before_was_used(path: Path, wal: Path) -> None:
    """No power cut leaves that. What the older one leads to is gone: refused loudly, by readers too."""
    _checkpoints_and_a_commit(path, 2, each=50)
    _flip(wal, _slots(wal)["newest"] + 40)
    with pytest.raises(JournalError, match="restore the file and its journal from a backup"):
        EventStore.open(path, expected=IDENTITY)
    with open_corpus(path) as corpus, pytest.raises(JournalError):
        len(corpus)


def test_two_damaged_headers_are_refused(path: Path, wal: Path) -> None:
    """Nothing says where the records begin."""
    _checkpoints_and_a_commit(path, 2, each=10)
    for place in _slots(wal).values():
        _flip(wal, place + 40)
    with pytest.raises(JournalError, match="both its headers are damaged"):
        EventStore.open(path, expected=IDENTITY)


def test_a_missing_journal_is_refused(crashed: Path, wal: Path) -> None:
    """Commits may have been in it."""
    wal.unlink()
    with pytest.raises(JournalError, match="put back the journal that belongs to the file"):
        EventStore.open(crashed, expected=IDENTITY)


def test_a_missing_file_is_named(crashed: Path, wal: Path) -> None:
    """A journal alone cannot be opened, and no file is created next to it."""
    crashed.unlink()
    with pytest.raises(CorpusNotFoundError, match="though its journal is there"):
        EventStore.open(crashed, expected=IDENTITY)
    with pytest.raises(JournalError, match=r"holds commits but 00\.h5 is missing"):
        EventStore.create(crashed, IDENTITY)
    assert wal.exists()
    assert not crashed.exists()


def test_swapped_journals_are_refused(crashed: Path, wal: Path, tmp_path: Path) -> None:
    """A UUID in both binds a journal to its file."""
    other = tmp_path / "01.h5"
    EventStore.create(other, IDENTITY).close()
    shutil.copy(wal, tmp_path / "01.h5.wal")
    with pytest.raises(JournalError, match="belongs to another file"):
        EventStore.open(other, expected=IDENTITY)


def test_a_file_that_is_older_than_its_journal_is_refused(path: Path, wal: Path, tmp_path: Path) -> None:
    """The journal holds only what changed since a checkpoint that the restored file has not seen."""
    backup = shutil.copy(path, tmp_path / "backup")
    _work_with_a_checkpoint(path)
    shutil.copy(backup, path)
    with pytest.raises(JournalError, match="older than its journal"):
        EventStore.open(path, expected=IDENTITY)


def test_a_journal_that_is_older_than_its_file_is_refused(path: Path, wal: Path, tmp_path: Path) -> None:
    """Its records would take the file back to a state between two others."""
    backup = shutil.copy(wal, tmp_path / "backup")
    _work_with_a_checkpoint(path)
    shutil.copy(backup, wal)
    with pytest.raises(JournalError, match="older than the file"):
        EventStore.open(path, expected=IDENTITY)


def test_histories_that_diverged_are_refused(path: Path, wal: Path, tmp_path: Path) -> None:
    """Two copies of a pair that both went on have the same UUID and as many records, but not the same ones."""
    first, second = tmp_path / "a", tmp_path / "b"
    for copy, last in ((first, 10), (second, 11)):
        copy.mkdir()
        shutil.copy(path, copy / "00.h5")
        shutil.copy(wal, copy / "00.h5.wal")
        with EventStore.open(copy / "00.h5", expected=IDENTITY) as store:
            commit_range(store, range(1, last))
    shutil.copy(second / "00.h5.wal", first / "00.h5.wal")
    with pytest.raises(JournalError, match="not their history"):
        EventStore.open(first / "00.h5", expected=IDENTITY)


def test_a_backup_of_both_files_is_a_good_one(path: Path, wal: Path, tmp_path: Path) -> None:
    """A pair restored together goes on from where it was."""
    commit_some = EventStore.open(path, expected=IDENTITY)
    commit_range(commit_some, range(1, 11))
    backups = [shutil.copy(file, tmp_path / f"{file.name}.backup") for file in (path, wal)]
    commit_range(commit_some, range(11, 21))
    commit_some.close()
    for backup, file in zip(backups, (path, wal), strict=True):
        shutil.copy(backup, file)
    with EventStore.open(path, expected=IDENTITY) as store:
        assert store.committed == 10


def test_anything_else_is_no_partition_file(path: Path) -> None:
    """A damaged head, or a file of another kind, is named as such."""
    _flip(path, 20)
    with pytest.raises(CorpusFormatError, match=r"00\.h5 is not a partition file"):
        EventStore.open(path, expected=IDENTITY)


@pytest.mark.parametrize("version", [1, 3])
def test_a_file_of_another_version_is_refused(path: Path, version: int) -> None:
    """By writers and readers; nothing was released, so no other version is read."""
    _set_version(path, 0, 32, version)
    with pytest.raises(CorpusFormatError, match=rf"00\.h5 has version {version} of the format, .* reads 2 only"):
        EventStore.open(path, expected=IDENTITY)
    with open_corpus(path) as corpus, pytest.raises(CorpusFormatError, match=rf"version {version}"):
        len(corpus)


@pytest.mark.parametrize("version", [1, 3])
def test_a_journal_of_another_version_is_refused(path: Path, wal: Path, version: int) -> None:
    """By writers and readers, although the file is right."""
    _set_version(wal, 4096, 60, version)
    with pytest.raises(JournalError, match=rf"00\.h5\.wal has version {version} of the format, .* reads 2 only"):
        EventStore.open(path, expected=IDENTITY)
    with open_corpus(path) as corpus, pytest.raises(JournalError, match=rf"version {version}"):
        len(corpus)


def test_the_journal_stays_bounded(path: Path, wal: Path) -> None:
    """Its room is used again after each checkpoint."""
    with EventStore.open(path, expected=IDENTITY, options=StoreOptions(checkpoint_bytes=200_000)) as store:
        for start in range(1, 3001, 30):
            commit_range(store, range(start, start + 30))
            store.maybe_checkpoint()
            # on a busy disk commits outrun a checkpoint: bounded is what they write while it keeps up
            eventually_sync(partial(_kept_up, store))
        assert store.stats.journaled_bytes > 1_500_000
    assert wal.stat().st_size <= 2 * 200_000


def _kept_up(store: EventStore) -> bool:
    store.maybe_checkpoint()
    return not store.stats.checkpoint_running


def _crash_after(path: Path, commits: int) -> None:
    store = EventStore.open(path, expected=IDENTITY)
    for start in range(1, 10 * commits, 10):
        commit_range(store, range(start, start + 10))
    store.abandon()


def _work_with_a_checkpoint(path: Path) -> None:
    with EventStore.open(path, expected=IDENTITY) as store:
        commit_range(store, range(1, 11))
        assert store.checkpoint()
        commit_range(store, range(11, 21))
        store.abandon()


def _checkpoints_and_a_commit(path: Path, checkpoints: int, *, each: int) -> None:
    """Make so many checkpoints, each after *each* events, and crash after a commit of ten more."""
    store = EventStore.open(path, expected=IDENTITY, options=StoreOptions(checkpoint_bytes=100_000))
    for _ in range(checkpoints):
        for _ in range(each // 10):
            commit_range(store, range(store.committed + 1, store.committed + 11))
        assert store.checkpoint()
    commit_range(store, range(store.committed + 1, store.committed + 11))
    store.abandon()


def _slots(wal: Path) -> dict[str, int]:
    """Return where the headers are: the one with the higher generation is the newest."""
    content = wal.read_bytes()
    older, newest = sorted((0, 4096), key=lambda place: int.from_bytes(content[place + 32 : place + 40], "little"))
    return {"older": older, "newest": newest}


def _set_version(file: Path, head: int, length: int, version: int) -> None:
    """Write another version into a head of *length* bytes, with the right CRC."""
    content = bytearray(file.read_bytes())
    content[head + 12 : head + 16] = version.to_bytes(4, "little")
    content[head + 8 : head + 12] = zlib.crc32(content[head + 12 : head + length]).to_bytes(4, "little")
    file.write_bytes(content)


def _last_record(wal: Path) -> int:
    content = wal.read_bytes()
    return content.rindex(b"FIQRECRD")


def _flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
