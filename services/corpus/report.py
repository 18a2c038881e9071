"""What a verification finds. No payload stands in it: a report can be sent around."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

#: the kinds of problems, words that a program can compare
KINDS = {
    "file": "a partition file cannot be opened",
    "journal": "a journal is damaged, missing, or of another file",
    "identity": "a file is of another store, volume, partition or stream than its neighbours or its name say",
    "volume": "`volume.json` is damaged",
    "index": "`corpus.h5` does not link exactly the partition files",
    "count": "the file holds more or fewer events than were committed",
    "name": "a group is named like no consultation",
    "elsewhere": "another partition file has the consultation too",
    "unreadable": "HDF5 cannot read a consultation",
    "payload": "bytes behind the last row's body: rows are missing at the end",
    "chain": "the event, its chain or the row before it was changed, removed or moved",
    "order": "the sequence does not rise",
    "ahead": "the sequence is above the one that is committed",
    "gap": "the body does not start where the one before ends",
    "outside": "the body lies outside the payload",
    "newline": "the body is not one line",
    "utf-8": "the body is not UTF-8",
    "json": "the body is not JSON",
    "duplicate": "an earlier row has the same event id",
    "more": "too many problems: the rest of the file was not looked at",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        kind: one of :data:`KINDS`.
        message: what it is, in a sentence.
        file: name of the file.
        consultation: its id; None when the whole file, or the directory, is meant.
        row: number of the row of ``events``, from 0.
        sequence: what that row says its stream sequence is.
    """

    kind: str
    message: str
    file: str
    consultation: str | None = None
    row: int | None = None
    sequence: int | None = None

    def __str__(self) -> str:
        place = self.file
        if self.consultation is not None:
            place += f" {self.consultation}"
        if self.row is not None:
            place += f" row {self.row} (sequence {self.sequence})"
        return f"{place}: {self.message}"


@dataclass(frozen=True, slots=True)
class PartitionReport:
    """What was looked at in one partition file.

    Attributes:
        file: its name.
        begins: first stream sequence that it may hold; above 1, what came before is only in other stores.
        committed: stream sequence of its last commit.
        consultations: how many were checked.
        events: how many were checked.
        payload_bytes: their bodies with line feeds.
        journal_records: commits that only the journal holds.
        archived: whether it is a copy that ``fiq repack`` made.
        problems: how many were found in it.
    """

    file: str
    begins: int
    committed: int
    consultations: int
    events: int
    payload_bytes: int
    journal_records: int
    archived: bool
    problems: int


@dataclass(frozen=True, slots=True)
class Report:
    """What a verification found.

    Attributes:
        path: what was verified.
        partitions: one entry for each partition file that could be opened.
        problems: all of them, in the order of files, consultations and rows.
        seconds: how long it took.
    """

    path: str
    partitions: tuple[PartitionReport, ...]
    problems: tuple[Problem, ...]
    seconds: float

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    @property
    def consultations(self) -> int:
        """How many consultations were checked."""
        return sum(partition.consultations for partition in self.partitions)

    @property
    def events(self) -> int:
        """How many events were checked."""
        return sum(partition.events for partition in self.partitions)

    @property
    def events_per_second(self) -> float:
        """The speed of the verification."""
        return self.events / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return everything as what JSON can hold."""
        totals = {
            "clean": self.clean,
            "consultations": self.consultations,
            "events": self.events,
            "events_per_second": round(self.events_per_second),
        }
        return asdict(self) | totals
