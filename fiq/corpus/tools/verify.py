"""Verifies a corpus: every row, every body, every chain; read-only, also while its writers work."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

from fiq.corpus.consultation import Consultation
from fiq.corpus.errors import CorpusError, CorpusFormatError, JournalError
from fiq.corpus.format import CONFLICTS, EVENT_DTYPE, EVENT_HEAD, chain_next, chain_start, is_consultation_id
from fiq.corpus.reader import INDEX_NAME, Corpus, PartitionInfo, open_corpus, partition_files, read_links
from fiq.corpus.wal.journal import RECORDS_START

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
#: who the volume is; the persister writes it, and the corpus only compares
VOLUME_NAME = "volume.json"
_JOURNALS = "*.h5.wal"
#: what is equal in all partition files of a data directory
_SHARED = ("store", "volume", "partitions", "stream", "stream_created")
#: rows that are looked at together
_ROWS = 4096
#: bytes of the payload that are read at once, unless one event is larger
_PAYLOAD_BYTES = 8 << 20
_LINE_FEED = 10

_Rows = npt.NDArray[np.void]
_Mask = npt.NDArray[np.bool_]
#: problems of one file from which on it is not looked at any further
MOST_PROBLEMS = 100_000
#: what h5py raises besides for objects that are not what they should be
_DAMAGE = (IndexError, TypeError, MemoryError)
#: how often progress is told, seconds
_TELL_SECONDS = 0.1


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


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a verification is.

    Attributes:
        file: name of the partition file that is looked at.
        fraction: of the whole, by the size of the files; 1 at the end.
        events: how many were checked.
    """

    file: str
    fraction: float
    events: int


def verify_corpus(path: str | PathLike[str], *, on_progress: Callable[[Progress], None] | None = None) -> Report:
    """Verify a data directory or one partition file.

    Each partition is looked at as of the moment when its turn comes; commits go on, checkpoints wait. Whatever
    is wrong with the content becomes a problem of the report, and everything else is still looked at.

    Args:
        path: a data directory (or the ``corpus.h5`` in it), or one partition file.
        on_progress: called some ten times a second.

    Raises CorpusNotFoundError: there is no such path, or no partition file in the directory.
    """
    started = time.monotonic()
    with open_corpus(path) as corpus:
        paths = corpus.paths
    is_directory = Path(path).is_dir() or Path(path) not in paths
    run = _Run(paths, on_progress)
    for place in paths:
        run.verify(place)
    if is_directory:
        run.problems += check_volume(paths[0].parent, run.infos)
        run.problems += check_index(paths[0].parent, paths)
        run.problems += check_journals(paths[0].parent)
    return Report(str(path), tuple(run.partitions), tuple(run.problems), round(time.monotonic() - started, 3))


def verify_partition(
    corpus: Corpus, *, on_progress: Callable[[Progress], None] | None = None
) -> tuple[PartitionReport | None, list[Problem]]:
    """Verify the only partition file of an open corpus, as of the moment when it was first looked into."""
    run = _Run(corpus.paths, on_progress)
    run.verify_open(corpus.paths[0], corpus)
    return (run.partitions[0] if run.partitions else None), run.problems


class _Run:
    """One verification: what it found so far, and how far it is."""

    def __init__(self, paths: Iterable[Path], on_progress: Callable[[Progress], None] | None) -> None:
        self.problems: list[Problem] = []
        self.partitions: list[PartitionReport] = []
        self.infos: list[PartitionInfo] = []
        self._sizes = {path: _size(path) for path in paths}
        self._total = sum(self._sizes.values()) or 1
        self._behind = 0
        self._events = 0
        self._on_progress = on_progress
        self._next_telling = 0.0
        #: consultation -> the file that holds it
        self._homes: dict[str, str] = {}

    def verify(self, path: Path) -> None:
        """Verify one partition file."""
        with Corpus([path]) as corpus:
            self.verify_open(path, corpus)

    def verify_open(self, path: Path, corpus: Corpus) -> None:
        """Verify one partition file through *corpus*, which holds no other."""
        before, events = len(self.problems), self._events
        try:
            (info,) = corpus.partitions
            self.infos.append(info)
            self._check_file(info)
            consultations, payload = self._check_consultations(info, corpus)
        except CorpusError as error:
            kind = "journal" if isinstance(error, JournalError) else "file"
            self.problems.append(Problem(kind, str(error), path.name))
        except _DAMAGE as error:
            self.problems.append(Problem("file", f"HDF5: {error}", path.name))
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
        self._behind += self._sizes[path]
        self._tell(path, 0.0, now=True)

    def _check_file(self, info: PartitionInfo) -> None:
        name, identity = info.path.name, info.identity
        if not info.has_journal and not info.archived:
            message = f"its journal {name}.wal is missing: commits that only it held are lost"
            self.problems.append(Problem("journal", message, name))
        if info.path.stem.isdecimal() and int(info.path.stem) != identity.partition:
            message = f"the file says that it is partition {identity.partition}: it was renamed, or copied over another"
            self.problems.append(Problem("identity", message, name))
        if identity.partition >= identity.partitions:
            message = f"the file says that it is partition {identity.partition} of {identity.partitions}"
            self.problems.append(Problem("identity", message, name))

    def _check_consultations(self, info: PartitionInfo, corpus: Corpus) -> tuple[int, int]:
        """Return how many consultations were checked, and the bytes of their payloads."""
        first, count, payload = self._events, 0, 0
        most = len(self.problems) + MOST_PROBLEMS
        for name in corpus:
            payload += self._check_consultation(info, corpus, name, first)
            count += 1
            if len(self.problems) >= most:
                message = f"more than {MOST_PROBLEMS} problems: the rest of the file was not looked at"
                self.problems.append(Problem("more", message, info.path.name))
                return count, payload
        found = self._events - first
        self._check_conflicts(info, corpus)
        if found != info.events:
            message = f"the consultations hold {found} events but {info.events} were committed"
            self.problems.append(Problem("count", message, info.path.name))
        return count, payload

    def _check_consultation(self, info: PartitionInfo, corpus: Corpus, name: str, first: int) -> int:
        file = info.path.name
        if not is_consultation_id(name):
            self.problems.append(Problem("name", "a group's name is no consultation id", file, ascii(name)))
            return 0
        home = self._homes.setdefault(name, file)
        if home != file:
            self.problems.append(Problem("elsewhere", f"the consultation stands in {home} too", file, name))
        done = payload = 0
        try:
            consultation = corpus[name]
            payload = consultation.payload_bytes
            check = ConsultationCheck(consultation, chain_start(info.identity, name), info.committed)
            for findings in check.run():
                self.problems += (_problem(finding, file, name) for finding in findings)
                self._events += check.done - done
                done = check.done
                self._tell(info.path, (self._events - first) / max(1, info.events))
        except (CorpusFormatError, *_DAMAGE) as error:
            self.problems.append(Problem("unreadable", f"cannot be read from row {done} on: {error}", file, name))
        return payload

    def _check_conflicts(self, info: PartitionInfo, corpus: Corpus) -> None:
        """Check the events under used ids as those of consultations; two of them may share an id."""
        file, count = info.path.name, 0
        for kept in corpus.conflicts():
            start = chain_start(info.identity, kept.id, of=CONFLICTS)
            try:
                for findings in ConsultationCheck(kept, start, info.committed, unique=False).run():
                    self.problems += (_problem(finding, file, f"{CONFLICTS}/{kept.id}") for finding in findings)
                count += len(kept)
            except (CorpusFormatError, *_DAMAGE) as error:
                message = f"its conflicts cannot be read: {error}"
                self.problems.append(Problem("unreadable", message, file, kept.id))
        if count != info.conflicts:
            message = f"the file holds {count} conflicts but {info.conflicts} were committed"
            self.problems.append(Problem("count", message, file))

    def _tell(self, path: Path, fraction: float, *, now: bool = False) -> None:
        if self._on_progress is not None and (now or time.monotonic() >= self._next_telling):
            self._next_telling = time.monotonic() + _TELL_SECONDS
            done = (self._behind + fraction * self._sizes[path]) / self._total
            self._on_progress(Progress(path.name, min(1.0, done), self._events))


def _problem(finding: Finding, file: str, consultation: str) -> Problem:
    return Problem(finding.kind, finding.message, file, consultation, finding.row, finding.sequence)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


# -- Checks one consultation: rows against their payload, their order, their ids, the bodies, the chain --------------


class Finding(NamedTuple):
    """Something wrong with a row, or, where that is None, with the whole consultation."""

    kind: str
    message: str
    row: int | None = None
    sequence: int | None = None


class ConsultationCheck:
    """The check of one consultation, slice by slice: memory stays bounded however long it is, but for its ids.

    Args:
        consultation: what to check.
        start: what its first row is chained to.
        committed: the sequence that the file has reached.
        unique: whether no id may stand twice; conflicts may share one.
    """

    def __init__(self, consultation: Consultation, start: bytes, committed: int, *, unique: bool = True) -> None:
        self._consultation = consultation
        self._committed = committed
        self._unique = unique
        self._chain = start
        self._sequence = 0
        self._end = 0
        self._ids: list[npt.NDArray[np.uint64]] = []
        #: rows that were looked at so far
        self.done = 0

    def run(self) -> Iterator[list[Finding]]:
        """Check a slice after another, and yield what is wrong in it.

        Raises CorpusError: the datasets cannot be read.
        """
        self._consultation.check_layout()
        while self.done < len(self._consultation):
            rows = self._consultation.table(self.done, self.done + _ROWS)
            found = [*self._order(rows), *self._bodies(rows)]
            self.done += len(rows)
            yield sorted(found, key=lambda finding: finding.row or 0)
        yield [*self._duplicates(), *self._surplus()]

    def _order(self, rows: _Rows) -> Iterator[Finding]:
        """Sequences rise and are committed; bodies lie one behind another."""
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

    def _bodies(self, rows: _Rows) -> Iterator[Finding]:
        total = np.uint64(self._consultation.payload_bytes)
        offsets, lengths = rows["offset"], rows["length"]
        inside = (offsets < total) & (lengths < total - np.minimum(offsets, total))
        yield from self._at(rows, ~inside, "outside", "the body lies outside the payload")
        heads, chains = rows.tobytes(), rows["chain"].tolist()
        for low, high in _stretches(rows, inside):
            lines = self._consultation.lines(int(offsets[low]), int(offsets[high - 1]) + int(lengths[high - 1]) + 1)
            yield from self._lines(rows[low:high], low, lines)
            yield from self._events(rows, low, high, lines.tobytes(), heads, chains)
        self._chain = chains[-1]

    def _lines(self, rows: _Rows, low: int, lines: npt.NDArray[np.uint8]) -> Iterator[Finding]:
        """Each body is one line."""
        ends = (rows["offset"] - rows["offset"][0] + rows["length"]).astype(np.int64)
        feeds = lines == _LINE_FEED
        if int(np.count_nonzero(feeds)) == len(rows) and bool(feeds[ends].all()):
            return
        wrong = np.zeros(len(rows), np.bool_)
        wrong |= ~feeds[ends]
        feeds[ends] = False
        wrong[np.searchsorted(ends, np.flatnonzero(feeds))] = True
        yield from self._at(rows, wrong, "newline", "the body is not one line with a line feed behind it", low)

    def _events(
        self, rows: _Rows, low: int, high: int, lines: bytes, heads: bytes, chains: list[bytes]
    ) -> Iterator[Finding]:
        """The chain fits, and each body is JSON. The loop that takes the time: some 2 µs an event."""
        width, head, parse = EVENT_DTYPE.itemsize, EVENT_HEAD.size, orjson.loads
        before = chains[low - 1] if low else self._chain
        place = 0
        for number, length in enumerate(rows["length"][low:high].tolist(), low):
            body = lines[place : place + length]
            place += length + 1
            chain = chains[number]
            if chain_next(before, heads[width * number : width * number + head], body) != chain:
                yield self._finding(rows, number, "chain", "the chain breaks: it or a row before was changed or moved")
            before = chain
            try:
                parse(body)
            except orjson.JSONDecodeError:
                yield self._finding(rows, number, *_why_no_json(body))

    def _duplicates(self) -> Iterator[Finding]:
        if not self._ids or not self._unique:
            return
        ids = np.concatenate(self._ids)
        order = np.lexsort((ids[:, 1], ids[:, 0]))  # stable: of equal ids the later row comes later
        same = (ids[order[1:]] == ids[order[:-1]]).all(axis=1)
        for row, first in sorted(zip(order[1:][same].tolist(), order[:-1][same].tolist(), strict=True)):
            sequence = int(self._consultation.table(row, row + 1)["seq"][0])
            yield Finding("duplicate", f"row {first} has the same event id", row, sequence)

    def _surplus(self) -> Iterator[Finding]:
        held = self._consultation.payload_bytes
        if held > self._end:
            yield Finding("payload", f"the payload has {held - self._end} bytes behind the last row: rows are missing")

    def _at(self, rows: _Rows, mask: _Mask, kind: str, message: str, low: int = 0) -> Iterator[Finding]:
        for number in np.flatnonzero(mask).tolist():
            yield Finding(kind, message, self.done + low + number, int(rows["seq"][number]))

    def _finding(self, rows: _Rows, number: int, kind: str, message: str) -> Finding:
        return Finding(kind, message, self.done + number, int(rows["seq"][number]))


def _shifted(values: npt.NDArray[np.uint64], first: int) -> npt.NDArray[np.uint64]:
    return np.concatenate((np.array([first], np.uint64), values[:-1]))


def _stretches(rows: _Rows, inside: _Mask) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows whose bodies lie inside the payload one behind another, and are not too long together."""
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


def check_volume(directory: Path, infos: Sequence[PartitionInfo]) -> Iterator[Problem]:
    """Compare the identities of the partition files with each other, and with ``volume.json`` where there is one."""
    for info in infos[1:]:
        for field in _SHARED:
            found, wanted = getattr(info.identity, field), getattr(infos[0].identity, field)
            if found != wanted:
                message = (
                    f"{field} is {found!r} but {infos[0].path.name} says {wanted!r}: the file is of another corpus"
                )
                yield Problem("identity", message, info.path.name)
    path = directory / VOLUME_NAME
    if not path.exists() or any(info.archived for info in infos):
        return
    try:
        stated = json.loads(path.read_bytes())
        wanted = {"volume": str(stated["volume"]), "store": str(stated["store"])}
    except (OSError, ValueError, KeyError, TypeError):
        yield Problem("volume", "it is no JSON object with volume and store: restore it", VOLUME_NAME)
        return
    for info in infos:
        for field, value in wanted.items():
            found = getattr(info.identity, field)
            if found != value:
                message = f"{field} is {found!r} but {VOLUME_NAME} says {value!r}: the file is of another volume"
                yield Problem("identity", message, info.path.name)


def check_index(directory: Path, paths: Sequence[Path]) -> Iterator[Problem]:
    """Check that ``corpus.h5`` links exactly the partition files; a directory without one is complete as well.

    Partitions may be created meanwhile: only *paths*, those that were there long before, must have a link, and a link
    may lead to any that is there by now.
    """
    path = directory / INDEX_NAME
    if not path.exists():
        return
    try:
        links = read_links(path)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        yield Problem("index", f"it cannot be read: {error}; write_index() makes it anew", INDEX_NAME)
        return
    before = {place.stem for place in paths}
    wanted = {place.stem: (place.name, "/") for place in partition_files(directory)}
    for name in sorted(wanted.keys() | links.keys()):
        found = links.get(name)
        if found is None and name in before:
            yield Problem("index", f"it has no link to {wanted[name][0]}; write_index() makes it anew", INDEX_NAME)
        elif found is not None and found != wanted.get(name):
            yield Problem("index", f"the link {name!a} leads nowhere or astray: {found!r}", INDEX_NAME)


def check_journals(directory: Path) -> Iterator[Problem]:
    """Find journals with commits whose partition file is gone."""
    for journal in sorted(directory.glob(_JOURNALS)):
        file = journal.with_suffix("")
        # creation writes the journal first: an empty one alone is what a crash leaves. One with commits had its file
        # beside it before them, so the file is looked for after the journal
        if journal.stat().st_size > RECORDS_START and not file.exists():
            yield Problem("journal", f"it holds commits but {file.name} is missing: restore the file", journal.name)
