"""A bit flipped in a journal: its torn tail is dropped cleanly, anything before is refused loudly."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from fiq.corpus import CorpusFormatError, EventStore, JournalError, open_corpus
from fiq.corpus.wal.journal import JournalRecord, read_journal, read_state, read_uuid
from tests.support.corpus import IDENTITY, commit_range, expected, stock_contents
from tests.support.torture import BATCH, CONSULTATIONS, small_options, times


@pytest.fixture
def crashed(tmp_path: Path) -> Path:
    """A pair as a crash left it, its journal having gone back to its front; copied for each flip."""
    path = tmp_path / "crashed" / "00.h5"
    path.parent.mkdir()
    store = EventStore.create(path, IDENTITY, small_options())
    for _ in range(100):
        commit_range(store, range(store.committed + 1, store.committed + 1 + BATCH), CONSULTATIONS)
        if _is_turned(path) and len(_live(path)) > 3:
            break
        if store.stats.journal_bytes > 120_000:
            store.checkpoint()
    store.abandon()
    return path


def test_a_flip_before_the_last_record_never_shortens_the_journal(crashed: Path, tmp_path: Path) -> None:
    """It is refused by writers and readers, or is where nothing is read: then nothing is missing."""
    *live, _ = _live(crashed)
    last = _committed(crashed)
    chance = random.Random(1)
    refused = 0
    for _ in range(times(40, 400)):
        record = chance.choice(live)
        path = _copy(crashed, tmp_path, chance.randrange(record.offset, record.end), chance)
        found = _recover(path)
        if found is None:
            refused += 1
            with open_corpus(path) as corpus, pytest.raises(CorpusFormatError):
                len(corpus)
        else:
            assert (last, expected(last, CONSULTATIONS)) == (found, stock_contents(path)[1])
    assert refused > times(20, 200)


def test_a_flip_in_the_last_record_drops_it_or_does_nothing(crashed: Path, tmp_path: Path) -> None:
    """It looks like a torn one; the batches before it are there."""
    record, last = _live(crashed)[-1], _committed(crashed)
    chance = random.Random(2)
    dropped = 0
    for _ in range(times(20, 200)):
        path = _copy(crashed, tmp_path, chance.randrange(record.offset, record.end), chance)
        with EventStore.open(path, expected=IDENTITY) as store:
            found = store.committed
        assert found in (last, last - BATCH)
        assert (found, expected(found, CONSULTATIONS)) == stock_contents(path)
        dropped += found < last
    assert dropped > times(10, 100)


def _recover(path: Path) -> int | None:
    """Return the sequence that recovery finds; None when it refuses."""
    try:
        with EventStore.open(path, expected=IDENTITY) as store:
            return store.committed
    except JournalError:
        return None


def _live(path: Path) -> list[JournalRecord]:
    journal = path.with_name(path.name + ".wal")
    with path.open("rb") as file, journal.open("rb") as wal:
        state, uuid = read_state(file.fileno(), path.name), read_uuid(file.fileno(), path.name)
        return read_journal(wal.fileno(), uuid, state, journal.name).records


def _is_turned(path: Path) -> bool:
    return any(record.next != record.end for record in _live(path))


def _committed(path: Path) -> int:
    with open_corpus(path) as corpus:
        return corpus.partitions[0].committed


def _copy(crashed: Path, target: Path, place: int, chance: random.Random) -> Path:
    for file in crashed.parent.iterdir():
        shutil.copy(file, target / file.name)
    journal = target / "00.h5.wal"
    content = bytearray(journal.read_bytes())
    content[place] ^= 1 << chance.randrange(8)
    journal.write_bytes(content)
    return target / "00.h5"
