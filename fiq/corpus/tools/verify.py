"""Verifies a corpus: every row, every body, every chain; read-only, also while its writers work.

Each partition file is checked as of the moment of its turn. A wrong content becomes a :class:`CorpusProblem` of the
report, and everything else is still checked.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from fiq.corpus.consultation import Consultation, Table
from fiq.corpus.errors import CorpusError, CorpusFormatError, JournalError, hdf5_says
from fiq.corpus.format import (
    CONFLICTS,
    EVENT_DTYPE,
    EVENT_HEAD,
    Identity,
    chain_next,
    chain_start,
    is_consultation_id,
)
from fiq.corpus.reader import (
    INDEX_NAME,
    Corpus,
    PartitionInfo,
    group_names,
    open_corpus,
    partition_files,
    read_links,
)
from fiq.corpus.wal.journal import RECORDS_START
from fiq.words import count as count_of

#: the kinds of problems, words that a program can compare
KINDS = {
    "file": "cannot be opened",
    "journal": "damaged, missing, or of another file",
    "identity": "of another store, volume, partition or stream",
    "volume": "`volume.json` is damaged",
    "index": "`corpus.h5` does not link exactly the partition files",
    "count": "more or fewer events than were committed",
    "names": "`/names` does not list exactly the consultations",
    "name": "no id of a consultation",
    "elsewhere": "another file has the consultation too",
    "unreadable": "HDF5 cannot read the consultation",
    "payload": "rows missing at the end",
    "chain": "row, chain or previous row was changed, removed or moved",
    "order": "sequence does not rise",
    "ahead": "sequence is not committed",
    "gap": "body does not follow the previous",
    "outside": "body outside the payload",
    "newline": "body is not one line",
    "utf-8": "body is not UTF-8",
    "json": "body is not JSON",
    "duplicate": "an earlier row has the same id",
    "more": "too many problems: the rest is unchecked",
}
#: identity of the data directory; the persister writes it, the corpus only compares
VOLUME_NAME = "volume.json"
#: what is equal in all partition files of a data directory
_SHARED = ("store", "volume", "partitions", "stream", "stream_created")
#: number of problems from which on a file is not checked any further
MOST_PROBLEMS = 100_000
#: rows that are checked together
_ROWS = 4096
#: bytes of the payload that are read at once, unless one event is larger
_PAYLOAD_BYTES = 8 << 20
_LINE_FEED = 10
#: what h5py raises besides for objects of the wrong kind
_DAMAGE = (IndexError, TypeError, MemoryError)
#: how often progress is reported, seconds
_PROGRESS_SECONDS = 0.1

_Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class CorpusProblem:
    """One thing that is wrong."""

    kind: str  #: one of :data:`KINDS`
    message: str
    file: str
    consultation: str | None = None  #: None for a problem of the whole file or directory
    row: int | None = None  #: number of the row of ``events``, from 0
    sequence: int | None = None  #: what that row states as its stream sequence

    def __str__(self) -> str:
        where = self.file
        if self.consultation is not None:
            where += f" {self.consultation}"
        if self.row is not None:
            where += f" row {self.row} (sequence {self.sequence})"
        return f"{where}: {self.message.removeprefix(f'{self.file}: ')}"


@dataclass(frozen=True, slots=True)
class PartitionReport:
    """What was checked in one partition file."""

    file: str
    begins: int  #: first stream sequence that it may hold; above 1, what came before is only in other stores
    committed: int  #: stream sequence of its last commit
    consultations: int
    events: int
    payload_bytes: int  #: bodies with line feeds
    journal_records: int  #: commits that only the journal holds
    archived: bool  #: whether ``fiq repack`` made it
    problems: int


@dataclass(frozen=True, slots=True)
class Report:
    """What a verification found."""

    path: str
    partitions: tuple[PartitionReport, ...]  #: one for each partition file that could be opened
    problems: tuple[CorpusProblem, ...]  #: in the order of files, consultations and rows
    seconds: float  #: duration

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
        """Return the report as JSON-compatible values."""
        return asdict(self) | {
            "clean": self.clean,
            "consultations": self.consultations,
            "events": self.events,
            "events_per_second": round(self.events_per_second),
        }


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a verification is."""

    file: str  #: name of the partition file that is being checked
    fraction: float  #: of the whole, by the size of the files
    events: int  #: how many were checked


def verify_corpus(path: str | PathLike[str], *, on_progress: Callable[[Progress], None] | None = None) -> Report:
    """Verify a data directory or one partition file; commits go on meanwhile, checkpoints wait.

    Args:
        path: a data directory (or the ``corpus.h5`` in it), or one partition file.
        on_progress: called some ten times a second.

    Raises CorpusNotFoundError: there is no such path, or no partition file in the directory.
    """
    started = time.monotonic()
    with open_corpus(path) as corpus:
        paths = corpus.paths
    run = _Run(paths, on_progress)
    for file in paths:
        with Corpus([file]) as one:
            run.verify(file, one)
    if Path(path).is_dir() or Path(path) not in paths:
        run.problems += _check_volume(paths[0].parent, run.infos)
        run.problems += _check_index(paths[0].parent, paths)
        run.problems += _check_journals(paths[0].parent)
    return Report(str(path), tuple(run.partitions), tuple(run.problems), round(time.monotonic() - started, 3))


@dataclass(frozen=True, slots=True)
class Checked:
    """How far :func:`verify_slice` has come in a consultation, and what the next row is compared with."""

    rows: int = 0
    sequence: int = 0  #: of the last one
    end: int = 0  #: of its body in the payload
    chain: bytes = b""  #: of the last row; empty before the first one


def verify_slice(
    consultation: Consultation,
    identity: Identity,
    committed: int,
    since: Checked,
    *,
    most_rows: int = 1024,
    most_bytes: int = 512 << 10,
) -> tuple[list[CorpusProblem], Checked]:
    """Verify the next rows of one consultation, which may be open for writing; ids are not compared with each other.

    Args:
        consultation: what to check.
        identity: of its file.
        committed: stream sequence of the file's last commit.
        since: where the slice before ended.
        most_rows: of this slice.
        most_bytes: of their bodies, unless one event is larger.

    Returns:
        the problems of these rows, and where the next slice begins; after the last row its ``rows`` is their number.

    Raises CorpusFormatError: the datasets cannot be read.
    """
    start = since.chain or chain_start(identity, consultation.id)
    check = _ConsultationCheck(consultation, committed, "", consultation.id, start, unique=False, since=since)
    return check.slice(most_rows, most_bytes), check.checked


def verify_partition(
    corpus: Corpus, *, on_progress: Callable[[Progress], None] | None = None
) -> tuple[PartitionReport | None, list[CorpusProblem]]:
    """Verify the only partition file of an open corpus, as of the moment when it was first read."""
    run = _Run(corpus.paths, on_progress)
    run.verify(corpus.paths[0], corpus)
    return (run.partitions[0] if run.partitions else None), run.problems


class _Run:
    """One verification: what it found so far, and how far it is."""

    def __init__(self, paths: Iterable[Path], on_progress: Callable[[Progress], None] | None) -> None:
        self.problems: list[CorpusProblem] = []
        self.partitions: list[PartitionReport] = []
        self.infos: list[PartitionInfo] = []
        self._sizes = {path: _size(path) for path in paths}
        self._total = sum(self._sizes.values()) or 1
        self._done_bytes = 0
        self._events = 0
        self._on_progress = on_progress
        self._next_progress = 0.0
        #: consultation -> the file that holds it
        self._files: dict[str, str] = {}

    def verify(self, path: Path, corpus: Corpus) -> None:
        """Verify one partition file through *corpus*, which holds no other."""
        before, events = len(self.problems), self._events
        try:
            (info,) = corpus.partitions
            self.infos.append(info)
            self._check_file(info)
            consultations, payload = self._check_consultations(info, corpus)
        except CorpusError as error:
            kind = "journal" if isinstance(error, JournalError) else "file"
            self._add(kind, str(error), path.name)
        except _DAMAGE as error:
            self._add("file", hdf5_says(error), path.name)
        else:
            report = PartitionReport(
                file=path.name,
                begins=info.begins,
                committed=info.committed,
                consultations=consultations,
                events=self._events - events,
                payload_bytes=payload,
                journal_records=info.journal_records,
                archived=info.archived,
                problems=len(self.problems) - before,
            )
            self.partitions.append(report)
        self._done_bytes += self._sizes[path]
        self._progress(path, 0.0, now=True)

    def _add(self, kind: str, message: str, file: str, consultation: str | None = None) -> None:
        self.problems.append(CorpusProblem(kind, message, file, consultation))

    def _check_file(self, info: PartitionInfo) -> None:
        name, partition, partitions = info.path.name, info.identity.partition, info.identity.partitions
        if not info.has_journal and not info.archived:
            self._add(
                "journal",
                f"its journal {name}.wal is missing: commits that only it held are not in the file; copy both files",
                name,
            )
        if info.path.stem.isdecimal() and int(info.path.stem) != partition:
            message = f"the file states that it is partition {partition}: it was renamed, or copied over another"
            self._add("identity", message, name)
        if partition >= partitions:
            self._add("identity", f"the file states that it is partition {partition} of {partitions}", name)

    def _check_consultations(self, info: PartitionInfo, corpus: Corpus) -> tuple[int, int]:
        """Return how many consultations were checked, and the bytes of their payloads."""
        first, consultations, payload = self._events, 0, 0
        most = len(self.problems) + MOST_PROBLEMS
        for name in self._names(info, corpus):
            payload += self._check_consultation(info, corpus, name, first)
            consultations += 1
            if len(self.problems) >= most:
                message = f"more than {MOST_PROBLEMS} problems: the rest of the file was not looked at"
                self._add("more", message, info.path.name)
                return consultations, payload
        found = self._events - first
        self._check_conflicts(info, corpus)
        if found != info.events:
            message = f"the consultations hold {count_of(found, 'event')} but {info.events} were committed"
            self._add("count", message, info.path.name)
        return consultations, payload

    def _names(self, info: PartitionInfo, corpus: Corpus) -> Iterable[str]:
        """Return the names of all groups: from the index, if it lists exactly these; it is read in bounded memory."""
        count, last = 0, ""
        try:
            for name in corpus:
                if name <= last or name not in corpus:
                    break
                count, last = count + 1, name
            else:
                if count == info.consultations:
                    return corpus
            wrong = f"it is wrong after {last!a}, its name number {count}, of {info.consultations}"
        except CorpusFormatError as error:
            wrong = str(error)
        message = f"the index of names does not list exactly the consultations ({wrong}): run `fiq recover --names`"
        self._add("names", message, info.path.name)
        return group_names(corpus)

    def _check_consultation(self, info: PartitionInfo, corpus: Corpus, name: str, first: int) -> int:
        file = info.path.name
        if not is_consultation_id(name):
            self._add("name", "a group's name is no consultation id", file, ascii(name))
            return 0
        other = self._files.setdefault(name, file)
        if other != file:
            self._add("elsewhere", f"{other} has the consultation too", file, name)
        done = payload = 0
        try:
            consultation = corpus[name]
            payload = consultation.payload_bytes
            start = chain_start(info.identity, name)
            check = _ConsultationCheck(consultation, info.committed, file, name, start)
            for problems in check.run():
                self.problems += problems
                self._events += check.done - done
                done = check.done
                self._progress(info.path, (self._events - first) / max(1, info.events))
        except (CorpusFormatError, *_DAMAGE) as error:
            self._add("unreadable", f"cannot be read from row {done} on: {error}", file, name)
        return payload

    def _check_conflicts(self, info: PartitionInfo, corpus: Corpus) -> None:
        """Check the events under used ids as those of consultations; two of them may share an id."""
        file, count = info.path.name, 0
        for kept in corpus.conflicts():
            start = chain_start(info.identity, kept.id, of=CONFLICTS)
            try:
                name = f"{CONFLICTS}/{kept.id}"
                check = _ConsultationCheck(kept, info.committed, file, name, start, unique=False)
                for problems in check.run():
                    self.problems += problems
                count += len(kept)
            except (CorpusFormatError, *_DAMAGE) as error:
                self._add("unreadable", f"its conflicts cannot be read: {error}", file, kept.id)
        if count != info.conflicts:
            self._add(
                "count", f"the file holds {count_of(count, 'conflict')} but {info.conflicts} were committed", file
            )

    def _progress(self, path: Path, fraction: float, *, now: bool = False) -> None:
        if self._on_progress is not None and (now or time.monotonic() >= self._next_progress):
            self._next_progress = time.monotonic() + _PROGRESS_SECONDS
            done = (self._done_bytes + fraction * self._sizes[path]) / self._total
            self._on_progress(Progress(path.name, min(1.0, done), self._events))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


class _ConsultationCheck:
    """Checks one consultation: rows against their payload, order, ids, bodies, chain.

    It takes slice after slice: memory stays bounded however long the consultation is, except for its ids.

    Args:
        consultation: what to check.
        committed: stream sequence of its file's last commit.
        file: by which problems name its file.
        name: by which problems name it.
        start: what the next row is chained to.
        unique: whether ids must differ; those of conflicts need not.
        since: where a check before this one ended.
    """

    def __init__(
        self,
        consultation: Consultation,
        committed: int,
        file: str,
        name: str,
        start: bytes,
        *,
        unique: bool = True,
        since: Checked | None = None,
    ) -> None:
        self._consultation = consultation
        self._committed = committed
        self._file = file
        self._name = name
        self._unique = unique
        self._chain = start
        since = since or Checked()
        self._sequence = since.sequence
        self._end = since.end
        self._ids: list[npt.NDArray[np.uint64]] = []
        #: rows that were checked so far
        self.done = since.rows

    @property
    def checked(self) -> Checked:
        """Where the next check begins."""
        return Checked(self.done, self._sequence, self._end, self._chain)

    def run(self) -> Iterator[list[CorpusProblem]]:
        """Check one slice after another, and yield the problems of each.

        Raises CorpusError: the datasets cannot be read.
        """
        self._consultation.check_layout()
        while self.done < len(self._consultation):
            yield self._check(self._consultation.table(self.done, self.done + _ROWS))
        yield [*self._duplicates(), *self._surplus()]

    def slice(self, most_rows: int, most_bytes: int) -> list[CorpusProblem]:
        """Check the next rows, and what comes after the last one."""
        self._consultation.check_layout()
        rows = self._consultation.table(self.done, self.done + most_rows)
        found = []
        if len(rows):
            ends = np.cumsum(rows["length"].astype(np.uint64) + np.uint64(1))
            found = self._check(rows[: max(1, int(np.searchsorted(ends, most_bytes, side="right")))])
        if self.done >= len(self._consultation):
            found += self._surplus()
        return found

    def _check(self, rows: Table) -> list[CorpusProblem]:
        found = [*self._check_order(rows), *self._check_bodies(rows)]
        self.done += len(rows)
        return sorted(found, key=lambda problem: problem.row or 0)

    def _check_order(self, rows: Table) -> Iterator[CorpusProblem]:
        """Sequences rise and are committed; each body starts where the one before ends."""
        sequences, offsets = rows["seq"], rows["offset"]
        ends = offsets + rows["length"] + np.uint64(1)
        not_rising = sequences <= _shifted(sequences, self._sequence)
        ahead = sequences > np.uint64(self._committed)
        gaps = offsets != _shifted(ends, self._end)
        self._sequence, self._end = int(sequences[-1]), int(ends[-1])
        self._ids.append(np.frombuffer(rows["event_id"].tobytes(), np.uint64).reshape(-1, 2))
        yield from self._at(rows, not_rising, "order", "the sequence does not rise above the one before")
        yield from self._at(rows, ahead, "ahead", f"the sequence is above {self._committed}, which is committed")
        yield from self._at(rows, gaps, "gap", "the body does not start where the one before ends")

    def _check_bodies(self, rows: Table) -> Iterator[CorpusProblem]:
        total = np.uint64(self._consultation.payload_bytes)
        offsets, lengths = rows["offset"], rows["length"]
        inside = (offsets < total) & (lengths < total - np.minimum(offsets, total))
        yield from self._at(rows, ~inside, "outside", "the body lies outside the payload")
        heads, chains = rows.tobytes(), rows["chain"].tolist()
        for low, high in _stretches(rows, inside):
            lines = self._consultation.lines(int(offsets[low]), int(offsets[high - 1]) + int(lengths[high - 1]) + 1)
            yield from self._check_lines(rows[low:high], low, lines)
            yield from self._check_events(rows, low, high, lines.tobytes(), heads, chains)
        self._chain = chains[-1]

    def _check_lines(self, rows: Table, low: int, lines: npt.NDArray[np.uint8]) -> Iterator[CorpusProblem]:
        """Each body is one line."""
        ends = (rows["offset"] - rows["offset"][0] + rows["length"]).astype(np.int64)
        feeds = lines == _LINE_FEED
        if int(np.count_nonzero(feeds)) == len(rows) and bool(feeds[ends].all()):
            return
        wrong = ~feeds[ends]
        feeds[ends] = False
        wrong[np.searchsorted(ends, np.flatnonzero(feeds))] = True
        yield from self._at(rows, wrong, "newline", "the body is not one line that a line feed ends", low)

    def _check_events(
        self, rows: Table, low: int, high: int, lines: bytes, heads: bytes, chains: list[bytes]
    ) -> Iterator[CorpusProblem]:
        """The chain fits, and each body is JSON. This loop takes most of the time: some 2 µs an event."""
        width, head, parse = EVENT_DTYPE.itemsize, EVENT_HEAD.size, orjson.loads
        before = chains[low - 1] if low else self._chain
        start = 0
        for number, length in enumerate(rows["length"][low:high].tolist(), low):
            body = lines[start : start + length]
            start += length + 1
            chain = chains[number]
            if chain_next(before, heads[width * number : width * number + head], body) != chain:
                message = "the chain breaks: it or a row before was changed or moved"
                yield self._problem("chain", message, self.done + number, rows["seq"][number])
            before = chain
            try:
                parse(body)
            except orjson.JSONDecodeError:
                yield self._problem(*_why_no_json(body), self.done + number, rows["seq"][number])

    def _duplicates(self) -> Iterator[CorpusProblem]:
        if not self._ids or not self._unique:
            return
        ids = np.concatenate(self._ids)
        order = np.lexsort((ids[:, 1], ids[:, 0]))  # stable: of equal ids the later row comes later
        same = (ids[order[1:]] == ids[order[:-1]]).all(axis=1)
        for row, first in sorted(zip(order[1:][same].tolist(), order[:-1][same].tolist(), strict=True)):
            sequence = self._consultation.row(row).sequence
            yield self._problem("duplicate", f"row {first} has the same event id", row, sequence)

    def _surplus(self) -> Iterator[CorpusProblem]:
        surplus = self._consultation.payload_bytes - self._end
        if surplus > 0:
            yield self._problem(
                "payload", f"the payload has {count_of(surplus, 'byte')} after the last row: rows are missing"
            )

    def _at(self, rows: Table, mask: _Mask, kind: str, message: str, low: int = 0) -> Iterator[CorpusProblem]:
        for number in np.flatnonzero(mask).tolist():
            yield self._problem(kind, message, self.done + low + number, rows["seq"][number])

    def _problem(self, kind: str, message: str, row: int | None = None, sequence: Any = None) -> CorpusProblem:
        return CorpusProblem(kind, message, self._file, self._name, row, None if sequence is None else int(sequence))


def _shifted(values: npt.NDArray[np.uint64], first: int) -> npt.NDArray[np.uint64]:
    return np.concatenate((np.array([first], np.uint64), values[:-1]))


def _stretches(rows: Table, inside: _Mask) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows whose bodies follow each other within the payload, and are not too long together."""
    starts = rows["offset"].tolist()
    ends = [start + length + 1 for start, length in zip(starts, rows["length"].tolist(), strict=True)]
    low = 0
    for high in range(1, len(rows) + 1):
        if (
            high == len(rows)
            or starts[high] != ends[high - 1]
            or ends[high] - starts[low] > _PAYLOAD_BYTES
            or not (inside[high] and inside[low])
        ):
            if inside[low]:
                yield low, high
            low = high


def _why_no_json(body: bytes) -> tuple[str, str]:
    try:
        body.decode()
    except UnicodeDecodeError:
        return "utf-8", "the body is not UTF-8"
    return "json", "the body is not JSON"


# -- The directory ----------------------------------------------------------------------------------------------------


def _check_volume(directory: Path, infos: Sequence[PartitionInfo]) -> Iterator[CorpusProblem]:
    """Compare the identities of the partition files with each other, and with ``volume.json`` where there is one."""
    for info in infos[1:]:
        for field in _SHARED:
            found, wanted = getattr(info.identity, field), getattr(infos[0].identity, field)
            if found != wanted:
                message = (
                    f"{field} is {found!r} but {infos[0].path.name} says {wanted!r}: the file is of another corpus"
                )
                yield CorpusProblem("identity", message, info.path.name)
    path = directory / VOLUME_NAME
    if not path.exists() or any(info.archived for info in infos):
        return
    try:
        stated = json.loads(path.read_bytes())
        wanted = {"volume": str(stated["volume"]), "store": str(stated["store"])}
    except (OSError, ValueError, KeyError, TypeError):
        yield CorpusProblem("volume", "it is no JSON object with volume and store: restore it", VOLUME_NAME)
        return
    for info in infos:
        for field, value in wanted.items():
            found = getattr(info.identity, field)
            if found != value:
                message = f"{field} is {found!r} but {VOLUME_NAME} says {value!r}: the file is of another volume"
                yield CorpusProblem("identity", message, info.path.name)


def _check_index(directory: Path, paths: Sequence[Path]) -> Iterator[CorpusProblem]:
    """Check that ``corpus.h5`` links exactly the partition files; a directory without one is complete as well.

    Partitions may be created meanwhile: only *paths*, found earlier, must have a link; a link may lead to a newer file.
    """
    path = directory / INDEX_NAME
    if not path.exists():
        return
    try:
        links = read_links(path)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        yield CorpusProblem("index", f"{hdf5_says(error)}; a persister writes a new one when it starts", INDEX_NAME)
        return
    before = {file.stem for file in paths}
    wanted = {file.stem: (file.name, "/") for file in partition_files(directory)}
    for name in sorted(wanted.keys() | links.keys()):
        found = links.get(name)
        if found is None and name in before:
            yield CorpusProblem(
                "index", f"it has no link to {wanted[name][0]}; a persister writes a new one when it starts", INDEX_NAME
            )
        elif found is not None and found != wanted.get(name):
            target = found if isinstance(found, str) else "".join(found).removesuffix("/")
            message = f"the link {name!a} leads to {target!a}, which is no partition file here"
            yield CorpusProblem("index", message, INDEX_NAME)


def _check_journals(directory: Path) -> Iterator[CorpusProblem]:
    """Find journals with commits whose partition file is gone."""
    for journal in sorted(directory.glob("*.h5.wal")):
        file = journal.with_suffix("")
        # creation writes the journal first: a crash may leave an empty one alone. One with commits had a file before
        # them, so the file is looked for after the journal
        if journal.stat().st_size > RECORDS_START and not file.exists():
            yield CorpusProblem(
                "journal", f"it holds commits but {file.name} is missing: restore the file", journal.name
            )
