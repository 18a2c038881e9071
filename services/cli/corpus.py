"""The commands that read a corpus: ``fiq show``, ``export``, ``verify``, ``recover`` and ``repack``."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import orjson
import typer
from rich.filesize import decimal

from fiq import corpus as library
from fiq.corpus import (
    Consultation,
    Corpus,
    CorpusError,
    CorpusLockedError,
    DamagedPartitionWarning,
    EventRecord,
    Report,
    UnknownConsultationError,
    open_corpus,
    recover_partition,
    verify_corpus,
)
from fiq.errors import InvalidIdError
from fiq.event import check_consultation_id
from services.cli import console
from services.cli.console import bar, count
from services.cli.errors import CommandError
from services.cli.target import CorpusOption, FolderOption, find_corpus
from services.log.status import Verified
from services.persister.volume import is_volume, note_verified

#: columns of CSV, and members of the objects of the two JSON forms
FIELDS = ("consultation", "sequence", "event_id", "received", "received_ns", "event_type", "event")
#: a spreadsheet takes a cell that starts with one of these for a formula (OWASP, "CSV Injection")
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
#: what it means that a file does not begin with the stream
_SEED = "earlier events are only in other stores; docs/operations.md, `A store that begins late`, says how to get them"

# -- fiq show, fiq export --------------------------------------------------------------------------------------------


class Format(StrEnum):
    """How a consultation is exported."""

    NDJSON = "ndjson"
    JSON = "json"
    CSV = "csv"


def show(
    consultation: Annotated[str, typer.Argument(help="Id of the consultation.")],
    corpus: CorpusOption = None,
    folder: FolderOption = None,
) -> None:
    """Print a consultation's events, one per line.

    Shows sequence, time (UTC), type and payload of everything that is committed; persisters may keep writing.
    """
    with opened(find_corpus(corpus, folder), consultation) as found:
        typer.echo(f"{found.id}: {len(found)} event{'' if len(found) == 1 else 's'}")
        for event in found:
            payload = orjson.dumps(event.payload).decode("utf-8")
            line = f"{event.sequence:>10}  {iso(event.received_ns)}  {event.event_type}  {payload}"
            typer.echo(console.printable(line))


def export(
    consultation: Annotated[
        str | None, typer.Argument(help="Id of the consultation. Without it, --after 0 exports all of them.")
    ] = None,
    form: Annotated[Format, typer.Option("--format", "-f", help="ndjson and json carry each event byte for byte.")] = (
        Format.NDJSON
    ),
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write, which appears when it is complete; stdout otherwise."),
    ] = None,
    after: Annotated[int | None, typer.Option(min=0, help="Only events whose sequence is greater than this.")] = None,
    corpus: CorpusOption = None,
    folder: FolderOption = None,
) -> None:
    """Write a consultation's events as NDJSON, JSON or CSV.

    In stream order, one event in memory at a time.
    """
    with _events(find_corpus(corpus, folder), consultation, after) as found, _target(output) as file:
        for piece in lines(found, form):
            file.write(piece)


@contextlib.contextmanager
def _events(path: Path, consultation: str | None, after: int | None) -> Iterator[Iterator[EventRecord]]:
    if consultation is not None:
        with opened(path, consultation) as found:
            yield (event for event in found if event.sequence > (after or 0))
        return
    if after is None:
        raise CommandError("name a consultation, or export all of them with --after 0")
    with opened_corpus(path) as corpus:
        yield (
            event
            for name in corpus
            if len(events := corpus[name]) and events.table(len(events) - 1)["seq"][0] > after
            for event in events
            if event.sequence > after
        )


@contextlib.contextmanager
def _target(output: Path | None) -> Iterator[BinaryIO]:
    if output is None or str(output) == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    try:
        with _file(output) as file:
            yield file
    except OSError as error:
        raise CommandError(f"cannot write {output}: {error.strerror}") from error


@contextlib.contextmanager
def _file(output: Path) -> Iterator[BinaryIO]:
    if output.exists() and not output.is_file():  # a pipe or a device cannot be replaced
        with output.open("wb") as file:
            yield file
        return
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        # medical data: for the owner only
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            yield file
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def opened(path: Path, consultation: str) -> Iterator[Consultation]:
    """Open the corpus at *path* for *consultation*.

    Raises CommandError: that is no consultation's id, the corpus cannot be read, or has no such consultation.
    """
    try:
        check_consultation_id(consultation)
    except InvalidIdError as error:
        raise CommandError(f"{consultation!r} is not a consultation's id: {error}") from None
    try:
        with opened_corpus(path) as corpus:
            yield corpus[consultation]
    except UnknownConsultationError:
        raise CommandError(
            f"there is no consultation {consultation!r} in {path}; an event accepted just now may still be on its way"
        ) from None


@contextmanager
def opened_corpus(path: Path) -> Iterator[Corpus]:
    """Open the corpus at *path*.

    Raises CommandError: it cannot be read, or, after the body, a partition file was left out since it is damaged;
    UnknownConsultationError: of the body.
    """
    try:
        with warnings.catch_warnings(), open_corpus(path) as corpus:
            warnings.simplefilter("ignore", DamagedPartitionWarning)
            yield corpus
            if damaged := corpus.damaged:
                raise CommandError("\n  ".join(["what can be read was read, but", *map(str, damaged)]))
    except UnknownConsultationError:
        raise
    except CorpusError as error:
        raise CommandError(f"cannot read the corpus in {path}: {error}") from error


def iso(nanoseconds: int) -> str:
    """Return a time as ISO 8601 in UTC, to the microsecond."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    moment = datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest // 1000)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def lines(events: Iterable[EventRecord], form: Format) -> Iterator[bytes]:
    """Yield the export piece by piece: one event at a time is in memory."""
    return {Format.NDJSON: _ndjson, Format.JSON: _json, Format.CSV: _csv}[form](events)


def _ndjson(events: Iterable[EventRecord]) -> Iterator[bytes]:
    for event in events:
        yield orjson.dumps(_document(event), option=orjson.OPT_APPEND_NEWLINE)


def _json(events: Iterable[EventRecord]) -> Iterator[bytes]:
    start = b"[\n"
    for event in events:
        yield start + orjson.dumps(_document(event))
        start = b",\n"
    yield b"[]\n" if start == b"[\n" else b"\n]\n"


def _csv(events: Iterable[EventRecord]) -> Iterator[bytes]:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerow(FIELDS)
    for event in events:
        row = _document(event)
        row["event"] = event.raw.decode("utf-8")
        writer.writerow([_cell(row[field]) for field in FIELDS])
        yield _drain(buffer)
    yield _drain(buffer)


def _drain(buffer: io.StringIO) -> bytes:
    text = buffer.getvalue()
    buffer.seek(0)
    buffer.truncate()
    return text.encode("utf-8")


def _cell(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(_FORMULA_STARTS):
        return "'" + value
    return value


def _document(event: EventRecord) -> dict[str, Any]:
    return {
        "consultation": event.consultation,
        "sequence": event.sequence,
        "event_id": str(event.event_id),
        "received": iso(event.received_ns),
        "received_ns": event.received_ns,
        "event_type": event.event_type,
        "event": orjson.Fragment(event.raw),  # byte for byte: numbers keep all of their digits
    }


# -- fiq verify, fiq recover, fiq repack ---------------------------------------------------------------------------


def verify(
    path: Annotated[
        Path | None,
        typer.Argument(help="Data directory, or one partition file; else FI_DATA_DIR, ./.fiq/corpus or ./corpus."),
    ] = None,
    folder: FolderOption = None,
    limit: Annotated[int, typer.Option(min=0, help="Problems to print; the rest is counted.")] = 20,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document with every problem.")] = False,
) -> None:
    """Check every row, body, chain and journal of a corpus.

    Checks the index too, while persisters keep writing. Changes no data; of a volume it records the result for metrics
    and GET /pipeline. The exit code is 1 if anything is wrong.
    """
    found = find_corpus(path, folder, how="as PATH")
    report = _verified(found)
    _record(found, report)
    if json:
        typer.echo(orjson.dumps(report.to_dict(), option=orjson.OPT_INDENT_2))
    else:
        _print(report, limit)
    if not report.clean:
        raise typer.Exit(1)


def _verified(path: Path) -> Report:
    with bar("verifying") as show:
        try:
            return verify_corpus(path, on_progress=lambda now: show(now.fraction, f"{now.events:,} events, {now.file}"))
        except CorpusError as error:
            raise CommandError(str(error)) from error


def _record(path: Path, report: Report) -> None:
    """Write down when the volume at *path* was verified and what was found; a copy or one file is no volume."""
    if not is_volume(path):
        return
    at = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        note_verified(path, Verified(at, report.events, len(report.problems)))
    except OSError as error:
        typer.echo(f"fiq: the result is not recorded: {error.filename or path}: {error.strerror}", err=True)


def _print(report: Report, limit: int) -> None:
    table = console.table("file", ">committed", ">consultations", ">events", ">payload", ">in the journal", ">problems")
    for one in report.partitions:
        table.add_row(
            one.file,
            str(one.committed),
            str(one.consultations),
            str(one.events),
            decimal(one.payload_bytes),
            "archive" if one.archived else count(one.journal_records, "commit"),
            str(one.problems),
        )
    console.show(table)
    for begins, files in _late(report):
        typer.echo(f"{files} begins at sequence {begins}: {_SEED}")
    for problem in report.problems[:limit]:
        typer.echo(console.printable(str(problem)))
    more = len(report.problems) - limit
    if more > 0 and limit:
        typer.echo(f"and {more} more; --json has all")
    verdict = "clean" if report.clean else count(len(report.problems), "problem")
    events, consultations = count(report.events, "event"), count(report.consultations, "consultation")
    typer.echo(
        f"{verdict}: {events} of {consultations} in {count(len(report.partitions), 'file')}, "
        f"{report.seconds:.1f} s, {report.events_per_second:,.0f} events/s"
    )


def _late(report: Report) -> list[tuple[int, str]]:
    """Return the first sequences of files that do not begin with the stream, and the names of those files."""
    found: dict[int, list[str]] = {}
    for one in report.partitions:
        if one.begins > 1:
            found.setdefault(one.begins, []).append(one.file)
    return [(begins, ", ".join(files)) for begins, files in sorted(found.items())]


def recover(
    path: Annotated[Path, typer.Argument(help="Data directory, or one partition file.")],
    names: Annotated[bool, typer.Option("--names", help="Write the indexes of names anew.")] = False,
) -> None:
    """Apply journals to their partition files.

    A persister does the same when it starts. The exit code is 1 if a file could not be recovered.
    """
    table = console.table("file", ">committed", ">replayed", ">torn", "")
    failures: list[str] = []
    locked: dict[str, list[tuple[str, str]]] = {}  # messages that differ only by the file's name are shown once
    try:
        paths = open_corpus(path).paths
    except CorpusError as error:
        raise CommandError(str(error)) from error
    with bar("recovering") as show:
        for number, file in enumerate(paths):
            show(number / len(paths), file.name)
            try:
                done = recover_partition(file, names=names)
            except CorpusLockedError as error:
                locked.setdefault(str(error).replace(file.name, ""), []).append((file.name, str(error)))
            except CorpusError as error:
                failures.append(str(error))
            else:
                state = f"still in the journal: {done.held_back}" if done.held_back else "complete"
                table.add_row(done.file, str(done.committed), str(done.replayed), str(done.torn), state)
                if done.held_back:
                    failures.append(f"{done.file}: {done.held_back}; nothing is lost, try again later")
    if table.row_count:
        console.show(table)
    for (_, reason), *others in locked.values():
        too = f" (and so for {', '.join(name for name, _ in others)})" if others else ""
        failures.append(f"{reason}{too}; its writer has recovered it, there is nothing to do")
    if failures:
        raise CommandError("\n  ".join(failures))


def repack(
    path: Annotated[Path, typer.Argument(help="Data directory, or one partition file.")],
    output: Annotated[Path, typer.Argument(help="Directory or file to create; must not exist.")],
) -> None:
    """Write a compact, verified copy of a corpus.

    Every reader opens the copy. It has no journal and is read-only. Persisters may keep writing the original.
    """
    with bar("repacking") as show:
        try:
            done = library.repack(path, output, on_progress=lambda step, fraction: show(fraction, step))
        except CorpusError as error:
            raise CommandError(str(error)) from error
    table = console.table("file", ">consultations", ">events", ">before", ">after")
    for one in done:
        sizes = decimal(one.bytes_before), decimal(one.bytes_after)
        table.add_row(one.file, str(one.consultations), str(one.events), *sizes)
    console.show(table)
    before, after = sum(one.bytes_before for one in done), sum(one.bytes_after for one in done)
    typer.echo(f"{output}: {decimal(after)} instead of {decimal(before)} ({after / before:.0%}), equal to the original")
