"""Verifies a corpus: every row, every body, every chain; read-only, also while its writers work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from services.corpus.chain import chain_start
from services.corpus.checks import ConsultationCheck, Finding
from services.corpus.directory import check_index, check_journals, check_volume
from services.corpus.errors import CorpusError, CorpusFormatError, JournalError
from services.corpus.format import CONFLICTS, is_consultation_id
from services.corpus.reader import Corpus, PartitionInfo, open_corpus
from services.corpus.report import PartitionReport, Problem, Report

#: problems of one file from which on it is not looked at any further
MOST_PROBLEMS = 100_000
#: what h5py raises besides for objects that are not what they should be
_DAMAGE = (IndexError, TypeError, MemoryError)
#: how often progress is told, seconds
_TELL_SECONDS = 0.1


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

    Raises:
        CorpusNotFoundError: there is no such path, or no partition file in the directory.
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
        for name in corpus.consultations():
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
