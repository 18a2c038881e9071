"""The forms in which a consultation is exported."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast
from uuid import UUID

import orjson
import pytest

from services.cli.corpus import FIELDS, Format, iso, lines

RECEIVED_NS = 1_795_453_297_123_456_789
EVENT_ID = UUID(int=1)


@dataclass(frozen=True)
class Event:
    """As the corpus hands events out."""

    sequence: int = 7
    consultation: str = "c-1"
    event_id: UUID = EVENT_ID
    received_ns: int = RECEIVED_NS
    raw: bytes = b'{"event_type": "MESSAGE_RECEIVED", "payload": {"dose": 1.10, "n": 123456789012345678901234567890}}'

    @property
    def event_type(self) -> str:
        return cast("str", orjson.loads(self.raw)["event_type"])


def exported(form: Format, *events: Event) -> bytes:
    return b"".join(lines(cast("Any", events), form))


def rows(content: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content.decode("utf-8"), newline="")))


def test_ndjson_is_one_object_a_line() -> None:
    """Each line parses by itself and carries all fields."""
    content = exported(Format.NDJSON, Event(7), Event(9))

    documents = [json.loads(line) for line in content.splitlines()]
    assert [document["sequence"] for document in documents] == [7, 9]
    assert tuple(documents[0]) == FIELDS
    assert documents[0]["received"] == "2026-11-23T17:01:37.123456Z"
    assert documents[0]["received_ns"] == RECEIVED_NS


@pytest.mark.parametrize("form", [Format.NDJSON, Format.JSON])
def test_the_event_is_exported_byte_for_byte(form: Format) -> None:
    """Numbers keep all of their digits, and spaces stay: nothing is parsed and written again."""
    assert b'"event":' + Event().raw in exported(form, Event())


@pytest.mark.parametrize("count", [0, 1, 3])
def test_json_is_one_array(count: int) -> None:
    """Any number of events makes one valid document, none included."""
    content = exported(Format.JSON, *[Event(number) for number in range(count)])

    assert list(range(count)) == [document["sequence"] for document in json.loads(content)]


def test_csv_has_a_header_and_one_row_an_event() -> None:
    """The columns are the fields, and the event's text is one cell."""
    found = rows(exported(Format.CSV, Event(7), Event(9)))

    assert tuple(found[0]) == FIELDS
    assert [row["sequence"] for row in found] == ["7", "9"]
    assert found[0]["event"] == Event().raw.decode()


def test_csv_of_nothing_is_its_header() -> None:
    """An empty consultation is a table without rows."""
    assert exported(Format.CSV) == (",".join(FIELDS) + "\r\n").encode()


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\\t", "\\r"])
def test_a_cell_of_csv_is_never_a_formula(start: str) -> None:
    """What clients chose may not become code in an analyst's spreadsheet (OWASP, CSV Injection)."""
    raw = f'{{"event_type": "{start}1+1", "payload": null}}'.encode()

    (row,) = rows(exported(Format.CSV, Event(raw=raw, consultation="-c")))

    assert row["event_type"] == "'" + start.replace("\\t", "\t").replace("\\r", "\r") + "1+1"
    assert row["consultation"] == "'-c"


@pytest.mark.parametrize("form", list(Format))
def test_an_export_streams(form: Format) -> None:
    """Only the events that were written have been read."""
    read = 0

    def source() -> Iterator[Event]:
        nonlocal read
        for number in range(1000):
            read += 1
            yield Event(number)

    pieces = lines(cast("Any", source()), form)
    next(pieces)
    next(pieces)

    assert read <= 2


@pytest.mark.parametrize(
    ("nanoseconds", "expected"),
    [(0, "1970-01-01T00:00:00.000000Z"), (RECEIVED_NS, "2026-11-23T17:01:37.123456Z")],
)
def test_times_are_iso_8601_in_utc(nanoseconds: int, expected: str) -> None:
    """Always six digits, so that texts sort as times do."""
    assert expected == iso(nanoseconds)
