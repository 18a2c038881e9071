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
import pandas as pd
import pyarrow.parquet as pq
import pytest

from services.cli.corpus import COLUMNS, FIELDS, MAX_COLUMNS, ColumnType, Format, find_columns, lines, write
from services.cli.errors import CommandError

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


def exported(form: Format, *events: Event, flat: bool = False) -> bytes:
    file = io.BytesIO()
    write(lambda: cast("Any", events), form, file, flat=flat)
    return file.getvalue()


def rows(content: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")))


def with_payload(payload: str) -> Event:
    return Event(raw=f'{{"event_type": "A", "payload": {payload}}}'.encode())


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
    """No column has numbers that a spreadsheet rounds, and the event's text is one cell."""
    found = rows(exported(Format.CSV, Event(7), Event(9)))

    assert (*COLUMNS, "event") == tuple(found[0])
    assert [row["sequence"] for row in found] == ["7", "9"]
    assert "2026-11-23T17:01:37.123456Z" == found[0]["received"]
    assert found[0]["event"] == Event().raw.decode()


def test_csv_begins_with_a_byte_order_mark() -> None:
    """Or a spreadsheet takes UTF-8 for the machine's old encoding. Without events there is the header only."""
    assert b"\xef\xbb\xbf" + ",".join((*COLUMNS, "event")).encode() + b"\r\n" == exported(Format.CSV)


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\\t", "\\r", "\\n", "＝", "＋", "－", "＠"])
def test_a_cell_of_csv_is_never_a_formula(start: str) -> None:
    """What clients chose may not become code in an analyst's spreadsheet (OWASP, CSV Injection)."""
    raw = f'{{"event_type": "{start}1+1", "payload": {{"text": "{start}2"}}}}'.encode()

    (row,) = rows(exported(Format.CSV, Event(raw=raw, consultation="-c"), flat=True))

    shown = start.replace("\\t", "\t").replace("\\r", "\r").replace("\\n", "\n")
    assert ("'-c", f"'{shown}1+1", f"'{shown}2") == (row["consultation"], row["event_type"], row["payload.text"])


def test_flat_csv_has_a_column_for_each_member_of_the_payloads() -> None:
    """In the order in which they come first; what an event lacks is empty, and what is no text is as in JSON."""
    events = (
        with_payload('{"dose": 1.10, "ok": true, "tags": ["a", {"b": 1.5}]}'),
        with_payload('{"text": "=1+1", "dose": -5, "none": null}'),
        with_payload('"only text"'),
        with_payload("null"),
    )

    found = rows(exported(Format.CSV, *events, flat=True))

    assert (*COLUMNS, "payload.dose", "payload.ok", "payload.tags", "payload.text", "payload") == tuple(found[0])
    assert [
        ["1.10", "true", '["a",{"b":1.5}]', "", ""],
        ["-5", "", "", "'=1+1", ""],
        ["", "", "", "", "only text"],
        ["", "", "", "", ""],
    ] == [list(row.values())[len(COLUMNS) :] for row in found]


@pytest.mark.parametrize(
    ("number", "cell"),
    [
        ("123456789012345", "123456789012345"),
        ("1795453297123456789", "'1795453297123456789"),
        ("-1795453297123456789", "'-1795453297123456789"),
        ('"1795453297123456789"', "'1795453297123456789"),
        ("1234567890123456.5", "'1234567890123456.5"),
        ("123456789012345678901234567890", "'123456789012345678901234567890"),
    ],
)
def test_a_whole_number_keeps_all_of_its_digits_in_a_spreadsheet(number: str, cell: str) -> None:
    """It keeps fifteen of a number, and all of a text."""
    (row,) = rows(exported(Format.CSV, with_payload(f'{{"n": {number}}}'), flat=True))

    assert cell == row["payload.n"]


@pytest.mark.parametrize("number", ["40.333333333333336", "-0.1234567890123456789", "1.7976931348623157e308"])
def test_a_fraction_stays_a_number_in_a_spreadsheet(number: str) -> None:
    """The mean of a column would leave out the texts in it."""
    (row,) = rows(exported(Format.CSV, with_payload(f'{{"n": {number}}}'), flat=True))

    assert number == row["payload.n"]


def test_columns_have_the_kind_that_holds_all_of_their_values() -> None:
    """Integers and fractions are numbers; anything else that differs is text, and so is what 64 bits cannot hold."""
    events = [
        with_payload(payload)
        for payload in ('{"a": 1, "b": 1, "c": true, "d": 9223372036854775808, "e": {}}', '{"a": 2.5, "b": "x"}')
    ]

    found = find_columns(cast("Any", events))

    kinds = {
        "a": ColumnType.NUMBER,
        "b": ColumnType.TEXT,
        "c": ColumnType.BOOLEAN,
        "d": ColumnType.TEXT,
        "e": ColumnType.TEXT,
    }
    assert {f"payload.{name}": kind for name, kind in kinds.items()} == found


def test_too_many_columns_are_refused() -> None:
    """Payloads whose members are data themselves are no table."""
    events = [with_payload(f'{{"m{number}": 1}}') for number in range(MAX_COLUMNS + 1)]

    with pytest.raises(CommandError, match="--type"):
        exported(Format.CSV, *events, flat=True)


def test_parquet_has_typed_columns() -> None:
    """Times in UTC to the nanosecond, sequences of 64 bits, and with flat payloads their own types."""
    events = (with_payload('{"dose": 1.5, "n": 7, "ok": true, "list": [1]}'), with_payload('{"dose": 2}'))

    plain = pq.read_table(io.BytesIO(exported(Format.PARQUET, *events)))
    flat = pq.read_table(io.BytesIO(exported(Format.PARQUET, *events, flat=True)))

    assert [*COLUMNS, "event"] == plain.schema.names
    assert [event.raw.decode() for event in events] == plain["event"].to_pylist()
    assert ("timestamp[ns, tz=UTC]", "uint64") == (
        str(plain.schema.field("received").type),
        str(plain.schema.field(1).type),
    )
    assert [RECEIVED_NS] * 2 == plain["received"].cast("int64").to_pylist()
    assert [
        {"payload.dose": 1.5, "payload.n": 7, "payload.ok": True, "payload.list": "[1]"},
        {"payload.dose": 2.0, "payload.n": None, "payload.ok": None, "payload.list": None},
    ] == flat.drop(list(COLUMNS)).to_pylist()


def test_pandas_reads_parquet_without_rounding() -> None:
    """Integers stay integers where an event lacks one, and what is missing is missing."""
    events = (with_payload('{"n": 1234567890123456789, "ok": true, "dose": 0.5, "text": "a"}'), with_payload("{}"))

    frame = pd.read_parquet(io.BytesIO(exported(Format.PARQUET, *events, flat=True)))

    assert [1234567890123456789] == frame["payload.n"].dropna().tolist()
    types = {"payload.n": "Int64", "payload.ok": "boolean", "payload.dose": "Float64"}
    assert types == {name: str(frame[name].dtype) for name in types}
    assert [[False] * 4, [True] * 4] == frame.filter(like="payload.").isna().to_numpy().tolist()
    assert ("uint64", "datetime64[ns, UTC]") == (str(frame["sequence"].dtype), str(frame["received"].dtype))
    assert [0, 1] == list(frame.index)


def test_parquet_of_nothing_has_its_columns() -> None:
    """An empty consultation is a table without rows."""
    assert [*COLUMNS, "event"] == pq.read_table(io.BytesIO(exported(Format.PARQUET))).schema.names


@pytest.mark.parametrize("form", [Format.NDJSON, Format.JSON])
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
