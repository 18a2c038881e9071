"""Writers to be killed, and what must be found after any crash.

The tests of tests/torture run in two sizes: a small one in `make test`, a long one in `make torture`.
"""

from __future__ import annotations

import fcntl
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from fiq.corpus import EventStore, KnownIds, StoreOptions, verify_corpus
from fiq.corpus.wal.journal import journal_path, read_journal, read_state, read_uuid
from tests.support.corpus import IDENTITY, commit_range, consultation_of, expected, record, stock_contents
from tests.support.polling import eventually_sync

#: events of a commit
BATCH = 20
#: events of a commit of a busy writer: the file must not outgrow a test that reads all of it often
SMALL_BATCH = 2
#: consultations that they are spread over
CONSULTATIONS = 40
#: a start of a writer, or a commit, is bounded by this, seconds
_START_SECONDS = 30.0

LONG = os.environ.get("FIQ_TORTURE") == "long"

_context = get_context("forkserver")
_context.set_forkserver_preload([__name__])


def times(quick: int, long: int) -> int:
    """Return how often to do something: in `make test`, or in `make torture`."""
    return long if LONG else quick


@dataclass(slots=True)
class Killed:
    """What the kills met.

    Attributes:
        kills: how many there were.
        in_checkpoints: how many left the partition file half copied.
        with_records: how many left commits that only the journal held.
        compacted: how many left a journal that had been compacted while a reader held the file.
        turned: how many left a journal whose live records had gone back to its front.
    """

    kills: int = 0
    in_checkpoints: int = 0
    with_records: int = 0
    turned: int = 0
    compacted: int = 0

    @property
    def varied(self) -> bool:
        """Whether each kind of moment was met, the common ones a few times."""
        return min(self.in_checkpoints, self.with_records, self.turned) > 2 and self.compacted > 0


def small_options(**changes: object) -> StoreOptions:
    """Return options under which everything that is rare happens often: checkpoints, turns, closings, compactions."""
    values: dict[str, object] = {
        "open_consultations": 15,
        "ids": KnownIds(300),
        "checkpoint_bytes": 60_000,
        "cached_pages": 64,
        "journal_limit": 150_000,
    }
    return StoreOptions(**(values | changes))  # type: ignore[arg-type]


@contextmanager
def held_by_a_reader(path: Path) -> Iterator[None]:
    """Lock the file as every reader does: checkpoints wait."""
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def write_until_killed(path: str, told: Connection) -> None:
    """Commit batch after batch, telling each one that is acknowledged. Runs in a process of its own."""
    with EventStore.open(Path(path), expected=None, options=small_options()) as store:
        told.send(store.committed)
        while True:
            commit_range(store, range(store.committed + 1, store.committed + 1 + BATCH), CONSULTATIONS)
            told.send(store.committed)
            store.maybe_checkpoint()


def kill_writer(path: Path, commits: int, seconds: float, *, in_checkpoint: bool = False) -> int:
    """Run a writer, kill it with -9 *seconds* after so many commits; return the last sequence that it acknowledged.

    Args:
        path: of the partition file.
        commits: that are waited for.
        seconds: from the last of these to the kill.
        in_checkpoint: wait for the next checkpoint to begin, too, and kill it then.

    Raises:
        AssertionError: it ended by itself.
    """
    receiver, sender = _context.Pipe(duplex=False)
    writer = _context.Process(target=write_until_killed, args=(str(path), sender))
    writer.start()
    sender.close()
    try:
        acknowledged = _told(receiver)
        for _ in range(commits):
            acknowledged = _told(receiver)
        # the moment of the kill is what is random here; nothing is waited for
        writer.join(seconds)
        if in_checkpoint:
            eventually_sync(partial(_is_in_checkpoint, path), _START_SECONDS, 0.0)
        writer.kill()
        writer.join(_START_SECONDS)
        assert writer.exitcode == -signal.SIGKILL, "the writer ended by itself"
        with suppress(EOFError):
            while True:
                acknowledged = int(receiver.recv())
        return acknowledged
    finally:
        writer.kill()
        writer.join(_START_SECONDS)
        receiver.close()
        writer.close()


def _told(receiver: Connection) -> int:
    """Return the next sequence that a writer acknowledges, which is alive."""
    if not receiver.poll(_START_SECONDS):
        raise TimeoutError("the writer makes no progress")
    try:
        return int(receiver.recv())
    except EOFError:
        raise AssertionError("the writer ended by itself") from None


@contextmanager
def busy_writer(path: Path) -> Iterator[BaseProcess]:
    """Run a writer that commits and makes checkpoints on and on, in small steps, and kill it in the end."""
    writer = _context.Process(target=_write_in_small_steps, args=(str(path),))
    writer.start()
    try:
        yield writer
    finally:
        writer.kill()
        writer.join(_START_SECONDS)
        assert writer.exitcode == -signal.SIGKILL, "the writer ended by itself"


def _write_in_small_steps(path: str) -> None:
    with EventStore.open(Path(path), expected=None, options=small_options()) as store:
        while True:
            commit_range(store, range(store.committed + 1, store.committed + 1 + SMALL_BATCH), CONSULTATIONS)
            store.maybe_checkpoint(now=True)


def check_recovered(path: Path, acknowledged: int) -> int:
    """Open what a crash left; the file must hold the acknowledged batches or one more, for us and for stock h5py.

    A verification then finds nothing: every row, body and chain is right.

    Returns:
        The sequence that was recovered.
    """
    with EventStore.open(path, expected=IDENTITY, options=small_options()) as store:
        recovered = store.committed
        for sequence in range(max(1, recovered - 2 * BATCH), recovered + 1):
            assert store.held(consultation_of(sequence, CONSULTATIONS), [record(sequence).event_id])
        unknown = record(recovered + 1)
        assert not store.held(consultation_of(recovered + 1, CONSULTATIONS), [unknown.event_id])
    assert recovered in (acknowledged, acknowledged + BATCH)
    assert (recovered, expected(recovered, CONSULTATIONS)) == stock_contents(path)
    report = verify_corpus(path)
    assert ((), recovered) == (report.problems, report.events)
    return recovered


def _is_in_checkpoint(path: Path) -> bool:
    with path.open("rb") as file:
        state = read_state(file.fileno(), path.name)
    return state.target != state.absorbed


def look_at(path: Path, killed: Killed) -> None:
    """Count what a kill left, before anything is recovered."""
    journal = journal_path(path)
    with path.open("rb") as file, journal.open("rb") as wal:
        state, uuid = read_state(file.fileno(), path.name), read_uuid(file.fileno(), path.name)
        records = read_journal(wal.fileno(), uuid, state, journal.name).records
    killed.kills += 1
    killed.in_checkpoints += state.target != state.absorbed
    killed.with_records += bool(records)
    killed.compacted += any(record.count > 1 for record in records)
    killed.turned += any(record.next != record.end for record in records)


def kill_again_and_again(path: Path, kills: int, seed: int, *, renew: int = 25) -> Killed:
    """Kill *kills* writers, each of which goes on where the last one was killed, so that damage would add up.

    Args:
        kills: how many at least; up to twice as many until each kind of moment was met.
        renew: after so many kills it starts over with an empty file, or the checks would take ever longer.
    """
    chance = random.Random(seed)
    killed = Killed()
    while killed.kills < kills or (killed.kills < 2 * kills and not killed.varied):
        if killed.kills % renew == 0:
            for file in path.parent.glob(f"{path.name}*"):
                file.unlink()
            EventStore.create(path, IDENTITY).close()
        held, commits, seconds = chance.random() < 0.25, chance.randrange(30), chance.uniform(0.0, 0.02)
        with held_by_a_reader(path) if held else nullcontext():
            # in memory a checkpoint is too short to be met by chance
            seen = not held and killed.kills % 5 == 0
            acknowledged = kill_writer(path, commits, seconds, in_checkpoint=seen)
        look_at(path, killed)
        check_recovered(path, acknowledged)
    return killed
