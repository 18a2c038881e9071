"""``fiq export``."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import orjson
import typer

from fiq.errors import InvalidIdError
from fiq.event import check_consultation_id
from services.cli import console
from services.cli.errors import CommandError
from services.cli.target import CorpusOption, FolderOption, find_corpus

if TYPE_CHECKING:
    from fiq.corpus import Consultation, Corpus, EventRecord

#: columns of CSV, and members of the objects of the two JSON forms
FIELDS = ("consultation", "sequence", "event_id", "received", "received_ns", "event_type", "event")
#: a spreadsheet takes a cell that starts with one of these for a formula (OWASP, "CSV Injection")
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


class Format(StrEnum):
    """How a consultation is exported."""

    NDJSON = "ndjson"
    JSON = "json"
    CSV = "csv"


@contextmanager
def opened(path: Path, consultation: str) -> Iterator[Consultation]:
    """Open the corpus at *path* for *consultation*.

    Raises CommandError: that is no consultation's id, the corpus cannot be read, or has no such consultation.
    """
    try:
        check_consultation_id(consultation)
    except InvalidIdError as error:
        raise CommandError(f"{consultation!r} is no consultation's id: {error}") from None
    from fiq.corpus import UnknownConsultationError  # h5py is slow to import

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

    Raises CommandError: it cannot be read; UnknownConsultationError: of the body.
    """
    from fiq.corpus import CorpusError, UnknownConsultationError, open_corpus

    try:
        with open_corpus(path) as corpus:
            yield corpus
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


if TYPE_CHECKING:
    from fiq.corpus import EventRecord


def export(
    consultation: Annotated[
        str | None, typer.Argument(help="Id of the consultation; all of them, one after the other, with --after.")
    ] = None,
    form: Annotated[Format, typer.Option("--format", "-f", help="ndjson and json carry each event byte for byte.")] = (
        Format.NDJSON
    ),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write, complete or not at all; stdout otherwise.")
    ] = None,
    after: Annotated[int | None, typer.Option(min=0, help="Only events after this sequence of the stream.")] = None,
    corpus: CorpusOption = None,
    folder: FolderOption = None,
) -> None:
    """Write a consultation's events as NDJSON, JSON or CSV."""
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
        raise CommandError("name a consultation, or with --after a sequence: then all of them are written")
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


def show(
    consultation: Annotated[str, typer.Argument(help="Id of the consultation.")],
    corpus: CorpusOption = None,
    folder: FolderOption = None,
) -> None:
    """Print a consultation's events, one per line.

    Sees everything that is committed, also while persisters write.
    """
    with opened(find_corpus(corpus, folder), consultation) as found:
        typer.echo(f"{found.id}: {len(found)} event{'' if len(found) == 1 else 's'}")
        for event in found:
            payload = orjson.dumps(event.payload).decode("utf-8")
            line = f"{event.sequence:>10}  {iso(event.received_ns)}  {event.event_type}  {payload}"
            typer.echo(console.printable(line))
