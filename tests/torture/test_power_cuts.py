"""What a power cut may leave, built from a recording of every write and sync: recovery gives whole batches (G4)."""

from __future__ import annotations

import random
from contextlib import nullcontext
from pathlib import Path

import pytest

from fiq.corpus import CorpusError, EventStore, open_corpus, verify_corpus
from fiq.corpus.wal.journal import read_state
from tests.support.corpus import IDENTITY, Contents, commit_range, expected, stock_contents
from tests.support.faulty_io import RecordingIO
from tests.support.torture import BATCH, CONSULTATIONS, LONG, held_by_a_reader, small_options, times

#: states that are built from one recording
_STATES = 50
#: one state of so many is also read and verified, before the recovery and after it
_READ_EACH = 10


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "00.h5"
    EventStore.create(path, IDENTITY).close()
    return path


@pytest.mark.timeout(3600 if LONG else 120)
@pytest.mark.parametrize("recording", range(times(4, 40)))
def test_a_power_cut_at_any_moment_leaves_whole_batches(path: Path, recording: int) -> None:
    """What was not synced may be there, missing or torn: recovery gives the acknowledged batches, or one more.

    Checkpoints run while commits go on, the journal wraps, and a second session recovers and goes on: all is cut.
    """
    recorded = _recorded_sessions(path)
    assert len(recorded) > 300
    assert [] == [seed for seed in range(_STATES) if _is_bad(path, recorded, seed + _STATES * recording)]


@pytest.mark.timeout(3600 if LONG else 120)
@pytest.mark.parametrize("recording", range(times(1, 10)))
def test_a_power_cut_while_a_reader_holds_checkpoints_back_leaves_whole_batches(path: Path, recording: int) -> None:
    """The journal outgrows its limit and is replaced by a compacted one, in each of the two sessions."""
    recorded = _recorded_sessions(path, reader=True)
    assert [] == [seed for seed in range(_STATES) if _is_bad(path, recorded, seed + _STATES * recording)]


@pytest.mark.timeout(3600 if LONG else 120)
@pytest.mark.parametrize("recording", range(times(1, 10)))
def test_a_power_cut_after_a_power_cut_leaves_whole_batches(path: Path, recording: int) -> None:
    """The first one leaves a file that is half copied: what recovers from it is cut again, and loses nothing of it."""
    first = _recorded_sessions(path)
    _cut_in_a_checkpoint(path, first, seed=recording)
    with open_corpus(path) as corpus:
        recovered = corpus.partitions[0].committed
    assert recovered > 0
    recorded = _recorded_sessions(path, acknowledged=recovered)
    assert [] == [seed for seed in range(_STATES) if _is_bad(path, recorded, seed + _STATES * recording)]


@pytest.mark.parametrize("deaf", ["00.h5", "00.h5.wal"])
def test_a_sync_that_is_left_out_would_be_found(path: Path, deaf: str) -> None:
    """The simulation is sharp: without the syncs of either file many power cuts do damage."""
    recorded = _recorded_sessions(path, deaf)
    assert sum(_is_bad(path, recorded, seed) for seed in range(20)) > 3


def _recorded_sessions(path: Path, deaf: str = "", *, reader: bool = False, acknowledged: int = 0) -> RecordingIO:
    recording = RecordingIO([path, path.with_name(path.name + ".wal")], deaf)
    recording.acknowledged = acknowledged
    options = small_options(io=recording, journal_limit=200_000, checkpoint_seconds=0.0)
    for _ in range(2):
        store = EventStore.open(path, expected=IDENTITY, options=options)
        with held_by_a_reader(path) if reader else nullcontext():
            for _ in range(24 if reader else 12):
                start = store.committed + 1
                commit_range(store, range(start, start + BATCH), CONSULTATIONS)
                recording.acknowledged = store.committed
                store.maybe_checkpoint(now=True)
        assert reader == (store.stats.compactions > 0)
        store.abandon()
    return recording


def _cut(path: Path, recording: RecordingIO, chance: random.Random) -> int:
    """Leave what a power cut at a random moment may leave; return what was acknowledged by then."""
    files, acknowledged = recording.crash_state(chance.randrange(len(recording) + 1), chance)
    for leftover in path.parent.iterdir():
        leftover.unlink()
    for name, content in files.items():
        path.with_name(name).write_bytes(content)
    return acknowledged


def _cut_in_a_checkpoint(path: Path, recording: RecordingIO, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(200):
        _cut(path, recording, chance)
        with path.open("rb") as file:
            state = read_state(file.fileno(), path.name)
        if state.target != state.absorbed:
            return
    pytest.fail("no power cut met a checkpoint")


def _is_bad(path: Path, recording: RecordingIO, seed: int) -> bool:
    """Return whether recovery from the state after a random power cut fails, or finds anything but whole batches."""
    acknowledged = _cut(path, recording, random.Random(seed))
    read = seed % _READ_EACH == 0
    try:
        before = _read(path) if read else None
        with EventStore.open(path, expected=IDENTITY) as store:
            recovered = store.committed
        found = stock_contents(path)
        after = _read(path) if read else None
    except (CorpusError, AssertionError, OSError, RuntimeError, ValueError, KeyError, TypeError):
        # what h5py raises for a damaged file differs with the place of the damage
        return True
    return (
        recovered not in (acknowledged, acknowledged + BATCH)
        or (recovered, expected(recovered, CONSULTATIONS)) != found
        or (read and not before == after == found)
    )


def _read(path: Path) -> tuple[int, Contents]:
    """Return what our own reader finds, after a verification that agrees."""
    with open_corpus(path) as corpus:
        committed = corpus.partitions[0].committed
        contents = {
            name: [(event.sequence, event.written_ns, event.id_bytes, event.raw) for event in consultation]
            for name, consultation in corpus.items()
        }
    report = verify_corpus(path)
    assert ((), committed) == (report.problems, report.events)
    return committed, contents
