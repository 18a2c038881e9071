"""The bodies of posts: events as JSON, one by one or split into batches.

A program's values become JSON once, before the first attempt; what JSON cannot express (NaN, infinities, unknown types)
is refused here. A batch of any length is split at the service's limits on number and bytes. Its events share its key
and have numbers from 1: event *n* has the key ``<key>:<n>``, which the service derives from the number of its line.
Empty lines count, so a request that begins with event 1,001 begins with 1,000 empty lines. To bound those, each block
of 10,000 numbers has a key of its own and counts from 1 again. So an event's id depends only on the batch's key and the
event's number, not on where the batch was split.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import orjson

from fiq.client.errors import InvalidArgumentError
from fiq.client.records import BadLine, Problem
from fiq.event import bare_key, event_id_of_line, without_line_breaks

#: an event as Python values, or as its JSON text, which is stored byte for byte
EventBody = Mapping[str, Any] | bytes | str

#: the service's limits on a batch: events, and bytes by default (FI_MAX_BATCH_BYTES)
_MAX_BATCH_EVENTS = 1000
MAX_BATCH_BYTES = 8 * 2**20
#: events that share a key
_BLOCK = 10_000


def encoded(event: EventBody) -> bytes:
    """Return *event* as JSON. Raises InvalidArgumentError: it cannot be; the message quotes nothing of it."""
    try:
        if isinstance(event, bytes | str):
            text = event.encode() if isinstance(event, str) else event
            if b"NaN" in text or b"Infinity" in text:  # inside of strings they are harmless
                orjson.loads(text)
            return text
        body = orjson.dumps(event, default=_as_dict, option=orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONDecodeError:
        raise InvalidArgumentError("the event is not JSON: JSON has no NaN and no infinities") from None
    except UnicodeEncodeError:
        raise InvalidArgumentError("the event cannot be written as JSON: it is not valid Unicode") from None
    except TypeError as error:  # its message names types, never values
        if "64-bit" in str(error):
            raise InvalidArgumentError(
                "the event cannot be written as JSON: an integer exceeds 64 bits; pass the event as JSON text"
            ) from None
        raise InvalidArgumentError(f"the event cannot be written as JSON: {error}") from None
    # orjson writes null for NaN and infinities
    if b"null" in body and not _is_finite(event):
        raise InvalidArgumentError("the event holds NaN or an infinity, which JSON does not have: use None or a string")
    return body


def _as_dict(value: object) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError


def _is_finite(value: Any) -> bool:
    """Return whether *value*, which orjson has serialised, holds finite numbers only."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str | int | None):
        return True
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    if dataclasses.is_dataclass(value):
        return all(_is_finite(getattr(value, one.name)) for one in dataclasses.fields(value))
    if isinstance(value, Enum):
        return _is_finite(value.value)
    tolist = getattr(value, "tolist", None)  # numpy's scalars and arrays
    return tolist is None or _is_finite(tolist())


@dataclass(slots=True)
class Batch:
    """Events of one request.

    Attributes:
        bodies: JSON texts without line breaks.
        numbers: of the events, ascending, all of one block.
        size: bytes of the bodies with a line break each.
    """

    bodies: list[bytes] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    size: int = 0

    @property
    def _block(self) -> int:
        return (self.numbers[0] - 1) // _BLOCK

    def add(self, number: int, body: bytes) -> None:
        """Add an event."""
        self.bodies.append(body)
        self.numbers.append(number)
        self.size += len(body) + 1

    def takes(self, number: int, body: bytes) -> bool:
        """Return whether another event may go into the same request."""
        return not self.bodies or (
            len(self.bodies) < _MAX_BATCH_EVENTS
            # the line breaks that stand for numbers before it are counted too
            and self.size + len(body) + _BLOCK < MAX_BATCH_BYTES
            and (number - 1) // _BLOCK == self._block
        )

    def key(self, key: str) -> str:
        """Return the key of the request: that of the whole in the first block, one derived from it in later ones."""
        return key if self._block == 0 else str(event_id_of_line(bare_key(key), self._block * _BLOCK))

    def lines(self) -> bytes:
        """Return the body of the request. The service counts empty lines, so that each event has its number."""
        lines: list[bytes] = []
        for number, body in zip(self.numbers, self.bodies, strict=True):
            lines += [b""] * (number - self._block * _BLOCK - 1 - len(lines))
            lines.append(body)
        return b"\n".join(lines)

    def halves(self) -> list[Batch]:
        """Return it as two."""
        middle = len(self.bodies) // 2
        found = [Batch(), Batch()]
        for at, (number, body) in enumerate(zip(self.numbers, self.bodies, strict=True)):
            found[at >= middle].add(number, body)
        return found

    def numbered(self, problem: Problem) -> Problem:
        """Return *problem* with the numbers of the events in place of those of the request's lines."""
        lines = tuple(BadLine(line.number + self._block * _BLOCK, line.reason) for line in problem.lines)
        return dataclasses.replace(problem, lines=lines)


class _Splitter:
    """Groups events into batches."""

    def __init__(self, numbers: Iterable[int] | None) -> None:
        self._given = numbers is not None
        self._numbers = itertools.count(1) if numbers is None else iter(numbers)
        self._last = 0
        self._batch = Batch()

    def add(self, event: EventBody) -> Iterator[Batch]:
        """Add *event*, and yield the batch before it if that is full. Raises InvalidArgumentError."""
        number = next(self._numbers, 0)
        if number <= self._last:
            raise InvalidArgumentError("numbers ascend from 1, one for each event")
        self._last = number
        try:
            body = without_line_breaks(encoded(event))
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"event {number}: {error}") from None
        if not self._batch.takes(number, body):
            yield self._batch
            self._batch = Batch()
        self._batch.add(number, body)

    def end(self) -> Iterator[Batch]:
        """Yield the last batch, if there is one."""
        if self._given and next(self._numbers, None) is not None:
            raise InvalidArgumentError("there are more numbers than events")
        if self._batch.bodies:
            yield self._batch


def split(events: Iterable[EventBody], numbers: Iterable[int] | None) -> Iterator[Batch]:
    """Yield *events* in batches. Raises InvalidArgumentError: an event or its number is malformed."""
    if isinstance(events, Mapping | str | bytes):
        raise InvalidArgumentError("a batch is an iterable of events: use post for one event")
    splitter = _Splitter(numbers)
    for event in events:
        yield from splitter.add(event)
    yield from splitter.end()


async def split_async(
    events: Iterable[EventBody] | AsyncIterable[EventBody], numbers: Iterable[int] | None
) -> AsyncIterator[Batch]:
    """Yield the batches of :func:`split`; *events* may be asynchronous."""
    if not isinstance(events, AsyncIterable):
        for batch in split(events, numbers):
            yield batch
        return
    splitter = _Splitter(numbers)
    async for event in events:
        for batch in splitter.add(event):
            yield batch
    for batch in splitter.end():
        yield batch
