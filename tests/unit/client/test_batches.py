"""The bodies of posts: what is refused before anything is sent, and how a batch is split."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any

import numpy as np
import orjson
import pytest

from fiq.client import EventBody, InvalidArgumentError
from fiq.client.batches import MAX_BATCH_BYTES, Batch, encoded, split, split_async
from fiq.event import event_id_of_line


@dataclass
class Vitals:
    pulse: float
    note: str | None = None


class Level(Enum):
    UNKNOWN = math.nan


NOT_FINITE = [math.nan, math.inf, -math.inf]


def event(payload: Any) -> dict[str, Any]:
    return {"event_type": "A", "note": None, "payload": payload}


@pytest.mark.parametrize("number", NOT_FINITE)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda number: number,
        lambda number: {"a": [{"b": (1, number)}]},
        lambda number: [Vitals(number)],
        lambda number: MappingProxyType({"a": number}),
        lambda number: np.float64(number),
        lambda number: np.float32(number),
        lambda number: [np.array([[1.0, number]])],
        lambda _: {"level": Level.UNKNOWN},
    ],
    ids=["plain", "nested", "dataclass", "mapping", "float64", "float32", "array", "enum"],
)
def test_nan_and_infinities_are_refused_wherever_they_are(number: float, wrap: Any) -> None:
    """JSON has neither; orjson would write null, and the value would be lost without a word."""
    with pytest.raises(InvalidArgumentError, match="NaN or an infinity"):
        encoded(event(wrap(number)))


@pytest.mark.parametrize("text", ['{"event_type": "A", "n": NaN}', b'{"event_type": "A", "n": -Infinity}'])
def test_json_text_with_nan_is_refused(text: str | bytes) -> None:
    """It is what json.dumps makes of it, and no JSON."""
    with pytest.raises(InvalidArgumentError, match="no NaN"):
        encoded(text)


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (None, None),
        ({"a": None, "b": "NaN null Infinity"}, {"a": None, "b": "NaN null Infinity"}),
        ([Vitals(1.5)], [{"pulse": 1.5, "note": None}]),
        (MappingProxyType({"a": [None]}), {"a": [None]}),
        (np.array([1.5, 2.0]), [1.5, 2.0]),
        (np.float64(1.5), 1.5),
    ],
)
def test_values_that_json_has_are_sent_as_they_are(payload: object, expected: object) -> None:
    """None is null; a text may say NaN."""
    assert event(expected) == orjson.loads(encoded(event(payload)))


def test_json_text_is_sent_byte_for_byte() -> None:
    """As bytes or as a string, with everything that a parser would normalise."""
    text = '{"event_type":"Ä", "n": 1.10, "note": "NaN"}'
    assert (text.encode(), text.encode()) == (encoded(text), encoded(text.encode()))


@pytest.mark.parametrize("value", [object(), {1, 2}, 2**64, {1: 2}, "\ud800"])
def test_what_json_cannot_express_is_refused_without_being_quoted(value: object) -> None:
    """Payloads are in no error message."""
    with pytest.raises(InvalidArgumentError, match="cannot be written as JSON") as caught:
        encoded({"event_type": "A", "secret-payload": value})
    assert "secret-payload" not in str(caught.value)


def test_a_long_integer_is_sent_as_text() -> None:
    """The message says how; in text all of its digits are kept."""
    with pytest.raises(InvalidArgumentError, match="an integer exceeds 64 bits; pass the event as JSON text"):
        encoded({"event_type": "A", "payload": 2**64})
    text = json.dumps({"event_type": "A", "payload": 2**64})
    assert text.encode() == encoded(text)


def events(count: int, size: int = 10) -> Iterator[bytes]:
    for number in range(1, count + 1):
        yield b'{"n":%d,"x":"%s"}' % (number, b"x" * size)


def keys_of(batches: list[Batch], key: str = "k") -> list[tuple[str, int]]:
    """Return the key and the number of the line of each event, as the service finds them."""
    found = []
    for batch in batches:
        for line, text in enumerate(batch.lines().split(b"\n"), start=1):
            if text:
                found.append((batch.key(key), line))
    return found


def test_a_batch_is_split_at_a_thousand_events() -> None:
    """The service takes no more in a request."""
    assert [1000, 1000, 500] == [len(batch.bodies) for batch in split(events(2500), None)]


def test_a_batch_is_split_at_the_limit_of_bytes() -> None:
    """Empty lines and line breaks are counted, too."""
    batches = list(split(events(40, 2**20), None))
    assert [7] * 5 + [5] == [len(batch.bodies) for batch in batches]
    assert max(len(batch.lines()) for batch in batches) <= MAX_BATCH_BYTES
    (alone,) = split(events(1, 2 * MAX_BATCH_BYTES), None)
    assert 1 == len(alone.bodies)


@pytest.mark.parametrize("sizes", [(10, 10), (10, 50_000)], ids=["short", "long"])
def test_an_events_key_depends_on_its_number_only(sizes: tuple[int, int]) -> None:
    """Else a retry under other limits, or with other events around it, would store it again."""
    first, second = (keys_of(list(split(events(1200, size), None))) for size in sizes)
    halves = keys_of([half for batch in split(events(1200), None) for half in batch.halves()])
    assert [("k", number) for number in range(1, 1201)] == first == second == halves


def test_no_request_has_more_empty_lines_than_a_block() -> None:
    """However long the batch is; each block has a key of its own, which no program would choose."""
    batches = list(split(events(25_000), None))
    assert max(batch.lines().count(b"\n") for batch in batches) < 10_000
    keys = keys_of(batches)
    assert 25_000 == len(set(keys))
    expected = ["k", str(event_id_of_line("k", 10_000)), str(event_id_of_line("k", 20_000))]
    assert expected == list(dict.fromkeys(key for key, _ in keys))
    assert (expected[1], 1) == keys[10_000]


def test_a_part_with_its_numbers_has_the_keys_of_the_whole() -> None:
    """Also beyond the first block."""
    whole = keys_of(list(split(events(10_010), None)))
    part = keys_of(list(split(events(3), [9_999, 10_000, 10_002])))
    assert [whole[9_998], whole[9_999], whole[10_001]] == part


@pytest.mark.parametrize("numbers", [[1, 1], [2, 1], [0, 1], [1], [1, 2, 3]])
def test_numbers_ascend_one_for_each_event(numbers: list[int]) -> None:
    """Else two events would have one key, or an event none."""
    with pytest.raises(InvalidArgumentError, match="numbers"):
        list(split(events(2), numbers))


def test_a_malformed_event_is_named_by_its_number() -> None:
    """Of a thousand, which?"""
    with pytest.raises(InvalidArgumentError, match="event 3: "):
        list(split([*events(2), {"event_type": "A", "n": math.nan}], None))


@pytest.mark.parametrize("one", [event(1), b'{"event_type":"A"}', '{"event_type":"A"}'])
def test_one_event_is_no_batch(one: Any) -> None:
    """Its members or characters would be sent as events."""
    with pytest.raises(InvalidArgumentError, match="use post for one event"):
        list(split(one, None))


def test_only_one_batch_of_a_generator_is_held() -> None:
    """A generator may be endless."""
    taken = 0

    def endless() -> Iterator[EventBody]:
        nonlocal taken
        while True:
            taken += 1
            yield b"{}"

    batches = split(endless(), None)
    assert (1000, 1001) == (len(next(batches).bodies), taken)
    assert (1000, 2001) == (len(next(batches).bodies), taken)


async def test_asynchronous_generators_are_split_alike() -> None:
    """Numbers, keys, limits."""

    async def generated() -> AsyncIterator[EventBody]:
        for one in events(2500):
            yield one

    assert list(split(events(2500), None)) == [batch async for batch in split_async(generated(), None)]
