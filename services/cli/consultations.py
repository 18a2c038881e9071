"""Reading one consultation for a command, and the forms in which it leaves."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from services.cli.errors import CommandError
from services.contract.errors import InvalidIdError
from services.contract.ids import check_consultation_id

if TYPE_CHECKING:
    from services.corpus import Consultation, Corpus, EventRecord

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

    Raises:
        CommandError: that is no consultation's id, the corpus cannot be read, or has no such consultation.
    """
    try:
        check_consultation_id(consultation)
    except InvalidIdError as error:
        raise CommandError(f"{consultation!r} is no consultation's id: {error}") from None
    from services.corpus import UnknownConsultationError  # h5py is slow to import

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

    Raises:
        CommandError: it cannot be read.
        UnknownConsultationError: of the body.
    """
    from services.corpus import CorpusError, UnknownConsultationError, open_corpus

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
