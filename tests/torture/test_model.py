"""Any sequence of operations against a plain dict: what is committed is there, and nothing else."""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fiq.corpus import Corpus, EventStore, Record, StorageIO, open_corpus
from fiq.corpus.wal.storage import Buffer
from tests.support.corpus import IDENTITY, Contents, contents, stock_contents
from tests.support.torture import LONG, small_options, times

_KNOWN = [f"c-{number}" for number in range(4)]


class _PausableIO(StorageIO):
    """Writes nothing while it is paused, so that a copy of the files is what a crash at that moment leaves."""

    def __init__(self) -> None:
        self.paused = threading.Lock()

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        with self.paused:
            return super().pwrite(fd, data, offset)

    def truncate(self, fd: int, size: int) -> None:
        with self.paused:
            super().truncate(fd, size)

    def allocate(self, fd: int, offset: int, length: int) -> None:
        with self.paused:
            super().allocate(fd, offset, length)

    def rename(self, source: Path, target: Path) -> None:
        with self.paused:
            super().rename(source, target)


class CorpusMachine(RuleBasedStateMachine):
    """A store with tiny limits, and what it must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="fiq-model-"))
        self.path = self.folder / "0" / "00.h5"
        self.path.parent.mkdir()
        self.io = _PausableIO()
        self.options = small_options(
            io=self.io, checkpoint_bytes=20_000, journal_limit=40_000, cached_pages=8, open_consultations=2
        )
        self.store = EventStore.create(self.path, IDENTITY, self.options)
        self.reader: Corpus | None = None
        self.reader_holds: Contents = {}
        self.committed: Contents = {}
        self.pending: list[tuple[str, tuple[int, int, bytes, bytes]]] = []
        self.sequence = self.reached = 0
        self.crashes = 0

    @rule(name=st.sampled_from(_KNOWN), sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=40))
    def append(self, name: str, sizes: list[int]) -> None:
        self._append(name, sizes)

    @rule(sizes=st.lists(st.integers(1, 200), min_size=1, max_size=3))
    def append_to_a_new_consultation(self, sizes: list[int]) -> None:
        self._append(f"new-{self.sequence}", sizes)

    @rule(data=st.data())
    def find_duplicates(self, data: st.DataObject) -> None:
        known = [(name, event[2]) for name, events in self.committed.items() for event in events]
        known += [(name, event[2]) for name, event in self.pending]
        if known:
            name, event_id = data.draw(st.sampled_from(known))
            assert self.store.held(name, [event_id])
            assert not self.store.held(name, [b"\xff" * 16])

    @rule()
    def commit(self) -> None:
        self.store.commit(self.sequence)
        for name, event in self.pending:
            self.committed.setdefault(name, []).append(event)
        self.pending.clear()
        self.reached = self.sequence

    @precondition(lambda self: not self.pending)
    @rule()
    def checkpoint(self) -> None:
        done = self.store.checkpoint()
        assert done or self.reader is not None
        if done:
            assert (self.reached, self.committed) == stock_contents(self.path)

    @rule()
    def checkpoint_beside(self) -> None:
        self.store.maybe_checkpoint(now=True)

    @rule()
    def roll_back(self) -> None:
        self.store.abandon()
        self._open()

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self._open()

    @rule()
    def crash(self) -> None:
        """Go on with a copy of the files as they are, maybe in the middle of a checkpoint or a compaction."""
        self._let_the_reader_go()
        self.crashes += 1
        copy = self.folder / str(self.crashes) / "00.h5"
        copy.parent.mkdir()
        with self.io.paused:
            for file in self.path.parent.iterdir():
                shutil.copy(file, copy.parent)
        self.store.abandon()
        shutil.rmtree(self.path.parent)
        self.path = copy
        self._open()

    @precondition(lambda self: self.reader is None)
    @rule()
    def let_a_reader_in(self) -> None:
        self.reader = open_corpus(self.path)
        self.reader_holds = {name: list(events) for name, events in self.committed.items()}
        assert self.reader.partitions[0].committed == self.reached

    @precondition(lambda self: self.reader is not None)
    @rule()
    def let_the_reader_go(self) -> None:
        assert self.reader is not None
        assert self.reader_holds == contents(self.reader)
        self._let_the_reader_go()

    @invariant()
    def the_sequence_is_that_of_the_last_commit(self) -> None:
        assert self.store.committed == self.reached

    def teardown(self) -> None:
        try:
            self._let_the_reader_go()
            self.store.close()
            assert (self.reached, self.committed) == stock_contents(self.path)
        finally:
            shutil.rmtree(self.folder)

    def _append(self, name: str, sizes: list[int]) -> None:
        records = []
        for size in sizes:
            self.sequence += 1
            event_id = self.sequence.to_bytes(16, "big")
            records.append(Record(self.sequence, self.sequence, self.sequence + 1, event_id, b'"' + b"x" * size + b'"'))
        self.store.append(name, records)
        self.pending += [(name, (one.sequence, one.written_ns, one.event_id, one.body)) for one in records]

    def _open(self) -> None:
        self.pending.clear()
        self.sequence = self.reached
        self.store = EventStore.open(self.path, expected=IDENTITY, options=self.options)

    def _let_the_reader_go(self) -> None:
        reader, self.reader = self.reader, None
        if reader is not None:
            reader.close()


@pytest.mark.timeout(3600 if LONG else 120)
def test_any_sequence_of_operations_keeps_what_is_committed() -> None:
    """Appends, commits, checkpoints, crashes, reopens, duplicates, new consultations, rollbacks, readers."""
    few = settings(
        max_examples=times(25, 400),
        stateful_step_count=times(30, 60),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    run_state_machine_as_test(CorpusMachine, settings=few)
