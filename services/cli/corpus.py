"""The commands about the events in a corpus: ``fiq ls``, ``show`` and ``export``.

``export`` writes events of one consultation, or of many, as NDJSON, JSON, CSV or Parquet, one at a time in memory.
NDJSON and JSON carry each event byte for byte. CSV is for spreadsheets and Parquet for analysis; with ``--flat`` both
have a column for each member of the payloads. The members are found by reading the events once before they are written,
from the same snapshot of the corpus. In CSV no cell becomes a formula, and no whole number loses digits; a fraction
stays a number, with which a spreadsheet computes. Parquet tells pandas which columns can lack values.
"""

from __future__ import annotations

import csv
import heapq
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import orjson
import typer
from rich.filesize import decimal

from fiq.corpus import (
    Consultation,
    Corpus,
    CorpusError,
    CorpusFormatError,
    DamagedPartition,
    DamagedPartitionWarning,
    EventRecord,
    UnknownConsultationError,
    open_corpus,
)
from fiq.words import count
from services.cli import console
from services.cli.console import JsonOption
from services.cli.errors import CommandError, UsageError
from services.cli.target import CorpusOption, FolderOption, check_consultation, find_corpus
from services.cli.times import ALWAYS, Period, SinceOption, UntilOption, iso


def ls(
    prefix: Annotated[str, typer.Option(help="Only consultations whose id starts with this.")] = "",
    since: SinceOption = None,
    until: UntilOption = None,
    json: JsonOption = False,
    corpus: CorpusOption = None,
    folder: FolderOption = None,
) -> None:
    """List consultations: events, first and last time, id.

    Sorted by id. With --since or --until those that have an event in that time; the numbers are of all of their events.
    """
    period = Period.of(since, until)
    path = find_corpus(corpus, folder)
    try:
        whole = open_corpus(path)
    except CorpusError as error:
        raise CommandError(f"cannot read the corpus in {path}: {error}") from error

    damaged = list(whole.missing)

    def note(part: Corpus, error: CorpusError) -> None:
        if part.paths[0] not in [one.path for one in damaged]:
            damaged.append(DamagedPartition(part.paths[0], error))

    def ids(part: Corpus) -> Iterator[tuple[str, Corpus]]:
        try:
            for name in part.ids(prefix):
                yield name, part
        except CorpusError as error:
            note(part, error)

    def summaries(merged: Iterable[tuple[str, Corpus]]) -> Iterator[dict[str, str | int]]:
        for name, part in merged:
            try:
                summary = _summary(part[name], period)
            except CorpusError as error:
                note(part, error)
            else:
                if summary is not None:
                    yield summary

    with ExitStack() as stack:
        merged = heapq.merge(*(ids(stack.enter_context(open_corpus(path))) for path in whole.paths), key=itemgetter(0))
        _list_json(summaries(merged)) if json else _list(summaries(merged))
    _check_complete(damaged)


def _summary(consultation: Consultation, period: Period) -> dict[str, str | int] | None:
    """Return what is listed; None for a consultation without an event in *period*."""
    if not len(consultation):
        return None
    first, last = (int(consultation.table(row, row + 1)["received_ns"][0]) for row in (0, len(consultation) - 1))
    if not (period.hold(first) or period.hold(last)) and not period.hold(consultation.table()["received_ns"]).any():
        return None
    return {"consultation": consultation.id, "events": len(consultation), "first": iso(first), "last": iso(last)}


def _list(found: Iterator[dict[str, str | int]]) -> None:
    typer.echo(f"{'events':>8}  {'first (UTC)':<19}  {'last (UTC)':<19}  consultation")
    for one in found:
        first, last = (str(one[name])[:19].replace("T", " ") for name in ("first", "last"))
        typer.echo(f"{one['events']:>8}  {first}  {last}  {one['consultation']}")


def _list_json(found: Iterator[dict[str, str | int]]) -> None:
    start = b"[\n"
    for one in found:
        typer.echo(start + orjson.dumps(one), nl=False)
        start = b",\n"
    typer.echo(b"[]" if start == b"[\n" else b"\n]")


def show(
    consultation: Annotated[str, typer.Argument(help="Id of the consultation.")],
    corpus: CorpusOption = None,
    folder: FolderOption = None,
) -> None:
    """Print a consultation's events, one per line.

    Shows sequence, time (UTC), type and payload of everything that is committed; persisters may keep writing.
    """
    check_consultation(consultation)
    with opened(find_corpus(corpus, folder), consultation) as found:
        typer.echo(f"{found.id}: {count(len(found), 'event')}")
        for event in found:
            payload = console.as_json(event.payload)
            typer.echo(
                console.printable(f"{event.sequence:>10}  {iso(event.received_ns)}  {event.event_type}  {payload}")
            )


@contextmanager
def opened(path: Path, consultation: str) -> Iterator[Consultation]:
    """Open the corpus at *path* for *consultation*.

    Raises CommandError: the corpus cannot be read, or has no such consultation.
    """
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
            _check_complete(corpus.damaged)
    except UnknownConsultationError:
        raise
    except CorpusError as error:
        advice = "; `fiq verify` shows what is wrong" if type(error) is CorpusFormatError else ""
        raise CommandError(f"cannot read the corpus in {path}: {error}{advice}") from error


def _check_complete(damaged: Sequence[DamagedPartition]) -> None:
    if damaged:
        raise CommandError("\n  ".join(["what can be read was read, but", *map(str, damaged)]))


# -- fiq export -------------------------------------------------------------------------------------------------------

#: members of the objects of the two JSON forms
FIELDS = ("consultation", "sequence", "event_id", "received", "received_ns", "event_type", "event")
#: columns of CSV and Parquet before those of the payload
COLUMNS = ("consultation", "sequence", "event_id", "received", "event_type")
#: a spreadsheet takes a text that starts with one of these for a formula (OWASP, "CSV Injection")
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
#: a spreadsheet keeps so many digits of a number; a text within a column is left out of its sums
_SAFE_DIGITS = 15
#: without it a spreadsheet takes UTF-8 for the machine's old encoding
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
#: members of payloads that become columns, at most
MAX_COLUMNS = 1000
#: events of a row group of Parquet
_GROUP_EVENTS = 5000
_INT64 = range(-(2**63), 2**63)


class Format(StrEnum):
    """How events are exported."""

    NDJSON = "ndjson"
    JSON = "json"
    CSV = "csv"
    PARQUET = "parquet"


#: what a file's name says of its format
SUFFIXES = {
    ".ndjson": Format.NDJSON,
    ".jsonl": Format.NDJSON,
    ".json": Format.JSON,
    ".csv": Format.CSV,
    ".parquet": Format.PARQUET,
}


def export(
    consultation: Annotated[
        str | None, typer.Argument(help="Id of the consultation; or choose several with --all or --prefix.")
    ] = None,
    form: Annotated[
        Format | None,
        typer.Option("--format", "-f", help="By default what the suffix of --output says; without one ndjson."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write, which appears when it is complete; stdout otherwise."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Export all consultations.")] = False,
    prefix: Annotated[str, typer.Option(help="Export the consultations whose id starts with this.")] = "",
    event_type: Annotated[str, typer.Option("--type", help="Only events of this type.")] = "",
    since: SinceOption = None,
    until: UntilOption = None,
    after: Annotated[int, typer.Option(min=0, help="Only events whose sequence is greater than this.")] = 0,
    flat: Annotated[
        bool, typer.Option("--flat", help="CSV, Parquet: a column for each member of the payloads, not the event.")
    ] = False,
    corpus: CorpusOption = None,
    folder: FolderOption = None,
) -> None:
    """Write events as NDJSON, JSON, CSV or Parquet.

    Consultation after consultation, each in stream order. ndjson and json carry each event byte for byte.
    """
    if (consultation is not None) + bool(every or prefix) != 1:
        raise UsageError("name one consultation, or choose several with --all or --prefix")
    if consultation is not None:
        check_consultation(consultation)
    to_file = output is not None and str(output) != "-"
    form = form or (_form(output) if output is not None and to_file else Format.NDJSON)
    if flat and form in (Format.NDJSON, Format.JSON):
        raise UsageError(f"--flat is for csv and parquet, not {form}: choose one with --format or the file's suffix")
    if form is Format.PARQUET:
        _check_pyarrow()
        if not to_file:
            raise UsageError("Parquet needs a file: name it with  -o FILE.parquet")
    selection = Selection(event_type, Period.of(since, until), after)
    with ExitStack() as stack:
        path = find_corpus(corpus, folder)
        if consultation is not None:
            chosen: Callable[[], Iterable[EventRecord]]
            one = stack.enter_context(opened(path, consultation))
            chosen = lambda: selection.of(one)  # noqa: E731
        else:
            many = stack.enter_context(opened_corpus(path))
            chosen = lambda: many.read(selection.of, prefix=prefix)  # noqa: E731
        counted = _Counted()
        with _target(output if to_file else None, force=force) as file:
            write(lambda: counted.of(chosen()), form, file, flat=flat)
        if to_file:
            size = f", {decimal(output.stat().st_size)}" if output is not None and output.is_file() else ""
            typer.echo(f"wrote {counted} to {output} ({form}{size})", err=True)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which events are exported: of a type, of a time, after a sequence."""

    event_type: str = ""
    period: Period = ALWAYS
    after: int = 0

    def of(self, consultation: Consultation) -> Iterator[EventRecord]:
        """Yield the chosen events. Raises CorpusFormatError: one is damaged, or its body is no JSON object."""
        if not len(consultation) or consultation.table(len(consultation) - 1)["seq"][0] <= self.after:
            return  # most consultations of a corpus, when what came last is exported
        for event in consultation.records(
            keep=lambda rows: (rows["seq"] > self.after) & self.period.hold(rows["received_ns"])
        ):
            found = event.event_type
            if not self.event_type or found == self.event_type:
                yield event


class _Counted:
    """Counts what passes, in the last pass."""

    def __init__(self) -> None:
        self._events = self._consultations = 0

    def of(self, events: Iterable[EventRecord]) -> Iterator[EventRecord]:
        self._events = self._consultations = 0
        last = None
        for event in events:
            self._events += 1
            self._consultations += event.consultation != last
            last = event.consultation
            yield event

    def __str__(self) -> str:
        return f"{count(self._events, 'event')} of {count(self._consultations, 'consultation')}"


def _form(output: Path) -> Format:
    """Return what a file's name says of its format. Raises CommandError: another format than fiq writes."""
    suffix = output.suffix.lower()
    if suffix and suffix not in SUFFIXES:
        raise UsageError(f"{output}: {suffix} is none of {', '.join(SUFFIXES)}: rename it, or choose with --format")
    return SUFFIXES.get(suffix, Format.NDJSON)


# -- The file ----------------------------------------------------------------------------------------------------------


@contextmanager
def _target(output: Path | None, *, force: bool) -> Iterator[BinaryIO]:
    if output is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    try:
        with _file(output, force=force) as file:
            yield file
    except OSError as error:
        raise CommandError(f"cannot write {output}: {error.strerror}") from error


@contextmanager
def _file(output: Path, *, force: bool) -> Iterator[BinaryIO]:
    if output.exists() and not output.is_file():  # a pipe or a device cannot be replaced
        with output.open("wb") as file:
            yield file
        return
    _check_absent(output, force=force)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        # medical data: for the owner only
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            yield file
        _check_absent(output, force=force)
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)


def _check_absent(output: Path, *, force: bool) -> None:
    if output.exists() and not force:
        raise CommandError(f"{output} exists: name another file, or replace it with --force")


# -- The forms ---------------------------------------------------------------------------------------------------------


def write(events: Callable[[], Iterable[EventRecord]], form: Format, file: BinaryIO, *, flat: bool = False) -> None:
    """Write events to *file*, one at a time in memory.

    Args:
        events: begins to yield them, each time it is called; it is called twice with *flat*.
        form: of the file.
        file: to write to.
        flat: whether CSV and Parquet have a column for each member of the payloads.

    Raises CommandError: the payloads have too many members for *flat*.
    """
    columns = find_columns(events()) if flat else None
    if form is Format.PARQUET:
        _write_parquet(events(), file, columns)
        return
    for piece in _csv(events(), columns) if form is Format.CSV else lines(events(), form):
        file.write(piece)


def lines(events: Iterable[EventRecord], form: Format) -> Iterator[bytes]:
    """Yield the export in one of the two JSON forms, piece by piece."""
    return {Format.NDJSON: _ndjson, Format.JSON: _json}[form](events)


def _ndjson(events: Iterable[EventRecord]) -> Iterator[bytes]:
    for event in events:
        yield orjson.dumps(_document(event), option=orjson.OPT_APPEND_NEWLINE)


def _json(events: Iterable[EventRecord]) -> Iterator[bytes]:
    start = b"[\n"
    for event in events:
        yield start + orjson.dumps(_document(event))
        start = b",\n"
    yield b"[]\n" if start == b"[\n" else b"\n]\n"


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


# -- Payloads as columns -----------------------------------------------------------------------------------------------


class ColumnType(StrEnum):
    """What the values of a column are."""

    BOOLEAN = "boolean"
    INTEGER = "integer"
    NUMBER = "number"
    TEXT = "text"


class _Number(float):
    """A number with a fraction or an exponent, as it was written."""

    def __new__(cls, text: str) -> _Number:
        made = super().__new__(cls, text)
        made.text = text
        return made

    text: str


def _payload(event: EventRecord) -> dict[str, Any]:
    """Return the columns of an event's payload: one a member; ``payload`` for one that is no object."""
    found = json.loads(event.raw, parse_float=_Number).get("payload")
    if isinstance(found, dict):
        return {f"payload.{member}": value for member, value in found.items() if value is not None}
    return {} if found is None else {"payload": found}


def find_columns(events: Iterable[EventRecord]) -> dict[str, ColumnType]:
    """Return the columns of the payloads of *events*, in the order of their first values.

    Raises CommandError: there are more than :data:`MAX_COLUMNS`.
    """
    columns: dict[str, ColumnType] = {}
    for event in events:
        for column, value in _payload(event).items():
            kind = _kind(value)
            before = columns.setdefault(column, kind)
            if kind is not before:
                numbers = {kind, before} == {ColumnType.INTEGER, ColumnType.NUMBER}
                columns[column] = ColumnType.NUMBER if numbers else ColumnType.TEXT
        if len(columns) > MAX_COLUMNS:
            raise CommandError(
                f"the payloads have more than {MAX_COLUMNS} different members: choose events with --type, or leave out "
                "--flat"
            )
    return columns


def _kind(value: Any) -> ColumnType:
    if isinstance(value, bool):
        return ColumnType.BOOLEAN
    if isinstance(value, int):
        return ColumnType.INTEGER if value in _INT64 else ColumnType.TEXT
    return ColumnType.NUMBER if isinstance(value, _Number) else ColumnType.TEXT


def _text(value: Any) -> str:
    """Return *value* as text: a text itself, anything else as in JSON."""
    if isinstance(value, str):
        return value
    return value.text if isinstance(value, _Number) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))


# -- CSV ---------------------------------------------------------------------------------------------------------------


def _csv(events: Iterable[EventRecord], columns: Iterable[str] | None) -> Iterator[bytes]:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    names = ("event",) if columns is None else tuple(columns)
    writer.writerow((*COLUMNS, *names))
    yield _BYTE_ORDER_MARK + _drain(buffer)
    for event in events:
        values = {"event": event.raw.decode("utf-8")} if columns is None else _payload(event)
        writer.writerow([_cell(value) for value in (*_head(event), *(values.get(name) for name in names))])
        yield _drain(buffer)


def _head(event: EventRecord) -> tuple[str, int, str, str, str]:
    """Return the values of :data:`COLUMNS`."""
    return event.consultation, event.sequence, str(event.event_id), iso(event.received_ns), event.event_type


def _drain(buffer: io.StringIO) -> bytes:
    text = buffer.getvalue()
    buffer.seek(0)
    buffer.truncate()
    return text.encode("utf-8")


def _cell(value: Any) -> str:
    """Return a cell that a spreadsheet shows as it is: the apostrophe makes it a text."""
    if value is None:
        return ""
    text = _text(value)
    if isinstance(value, int | float):
        unsafe = sum(map(str.isdigit, text.partition(".")[0])) > _SAFE_DIGITS  # a fraction may be rounded
    else:
        unsafe = text.startswith(_FORMULA_STARTS) or (len(text) > _SAFE_DIGITS and text.isdecimal())
    return f"'{text}" if unsafe else text


# -- Parquet -----------------------------------------------------------------------------------------------------------


def _check_pyarrow() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ModuleNotFoundError:
        raise CommandError("Parquet needs pyarrow: run  pip install 'fiq[services,parquet]'") from None


def _write_parquet(events: Iterable[EventRecord], file: BinaryIO, columns: dict[str, ColumnType] | None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {
        ColumnType.BOOLEAN: pa.bool_(),
        ColumnType.INTEGER: pa.int64(),
        ColumnType.NUMBER: pa.float64(),
        ColumnType.TEXT: pa.string(),
    }
    head = zip(COLUMNS, (pa.string(), pa.uint64(), pa.string(), pa.timestamp("ns", "UTC"), pa.string()), strict=True)
    kinds = {"event": ColumnType.TEXT} if columns is None else columns
    schema = pa.schema([*head, *((name, types[kind]) for name, kind in kinds.items())], _for_pandas(kinds))
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        left = iter(events)
        while group := list(islice(left, _GROUP_EVENTS)):
            table: dict[str, list[Any]] = {name: [] for name in schema.names}
            for event in group:
                consultation, sequence, event_id, _, event_type = _head(event)
                row = (consultation, sequence, event_id, event.received_ns, event_type)
                for name, value in zip(COLUMNS, row, strict=True):
                    table[name].append(value)
                values = {"event": event.raw.decode("utf-8")} if columns is None else _payload(event)
                for name, kind in kinds.items():
                    value = values.get(name)
                    table[name].append(_text(value) if kind is ColumnType.TEXT and value is not None else value)
            writer.write_batch(pa.RecordBatch.from_pydict(table, schema=schema))


def _for_pandas(kinds: Mapping[str, ColumnType]) -> dict[str, str]:
    """Return the metadata by which pandas chooses types that can lack values: its own are floats, which round."""
    types = {
        ColumnType.BOOLEAN: ("bool", "boolean"),
        ColumnType.INTEGER: ("int64", "Int64"),
        ColumnType.NUMBER: ("float64", "Float64"),
    }
    columns = [
        {
            "name": name,
            "field_name": name,
            "pandas_type": types[kind][0],
            "numpy_type": types[kind][1],
            "metadata": None,
        }
        for name, kind in kinds.items()
        if kind in types
    ]
    return {"pandas": json.dumps({"index_columns": [], "column_indexes": [], "columns": columns})}
