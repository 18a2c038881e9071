"""Replays a journal into its partition file without the service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.corpus.store import EventStore


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a recovery did.

    Attributes:
        file: name of the partition file.
        committed: stream sequence of the last commit.
        replayed: commits that only the journal held.
        torn: commits that a crash had cut short and that were dropped; they were never acknowledged.
        held_back: why the journal could not be copied into the file yet, though nothing is lost; empty when it was.
    """

    file: str
    committed: int
    replayed: int
    torn: int
    held_back: str


def recover_partition(path: Path) -> Recovered:
    """Open a partition file as its writer does, copy what its journal holds into it, and close it.

    Stock tools see everything that was committed then. A persister does the same when it opens the file.

    Raises:
        CorpusLockedError: a writer has it open; there is nothing to recover then.
        CorpusError: it cannot be recovered; the message says what to do.
    """
    with EventStore.open(path, expected=None) as store:
        done = store.checkpoint()
        stats = store.stats
        return Recovered(
            file=path.name,
            committed=store.committed,
            replayed=stats.records_recovered,
            torn=stats.torn_records,
            held_back="" if done else stats.checkpoint_deferred_because,
        )
