"""Slices of JSON text: where the elements of an array, or the members of an object, begin and end.

So these can be kept byte for byte. Only strings, brackets and commas are looked at; whether the slices are JSON shows
when they are parsed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

import orjson

#: a step of :func:`slices` takes at most some milliseconds; after so many steps or bytes it lets its caller pause
_PAUSE_STEPS, PAUSE_BYTES = 1000, 2**16
SPACE = b" \t\r\n"

_STRING = rb'"(?:[^"\\]++|\\.)*+"'
#: a string without very many escapes; what follows a string's first quote, until its end or so many escapes
_SHORT_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+){0,200}+"'
_IN_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+){0,200}+', re.DOTALL)
#: an array or object without others in it
_FLAT = rb'[\[{][^"\[\]{}]*+(?:%b[^"\[\]{}]*+){0,20}+[\]}]' % _SHORT_STRING
#: the next token outside strings: at the top level a comma counts, deeper only brackets; a quote after many strings
_AT_TOP, _INSIDE = (
    re.compile(rb"[^%b]*+(?:(?:%b|%b)[^%b]*+){0,50}+([%b]?)" % (stop, _SHORT_STRING, _FLAT, stop, stop), re.DOTALL)
    for stop in (rb'"\[\]{},', rb'"\[\]{}')
)
_NAME = re.compile(rb"[ \t\r\n]*+(" + _STRING + rb")[ \t\r\n]*+:", re.DOTALL)
_SPACES = re.compile(rb"[ \t\r\n]*+")
_CLOSING = {b"[": b"]", b"{": b"}"}


def end_of(pattern: re.Pattern[bytes], raw: bytes, position: int, until: int = sys.maxsize) -> int:
    """Return where *pattern*, which always matches, ends."""
    found = pattern.match(raw, position, until)
    assert found is not None
    return found.end()


# -- slices -----------------------------------------------------------------------------------------------------------


class Slice(NamedTuple):
    """Where a part of a text is: its number, from 1, and its bytes from *begin* up to *end*."""

    number: int
    begin: int
    end: int


def slice_array(raw: bytes) -> Iterator[bytes]:
    """Yield the text of each element of the JSON array *raw*, without the white space around it."""
    return (raw[one.begin : one.end] for one in slices(raw) if one is not None)


def slice_object(raw: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the name of each member of the JSON object *raw* and the text of its value."""
    for part in slice_array(raw):
        name = _NAME.match(part)
        assert name is not None
        yield orjson.loads(name[1]), part[name.end() :].strip(SPACE)


def slices(raw: bytes) -> Iterator[Slice | None]:
    """Yield where the parts between the commas of the array or object *raw* are; None after some work.

    Raises ValueError: *raw* is neither, or it does not end where its last bracket closes.
    """
    position = end_of(_SPACES, raw, 0) + 1
    closing = _CLOSING.get(raw[position - 1 : position])
    if closing is None:
        raise ValueError("it is neither an array nor an object")
    begin, number, depth, in_string = position, 1, 1, False
    steps, paused = 0, position
    while depth:
        steps += 1
        if steps > _PAUSE_STEPS or position - paused > PAUSE_BYTES:
            yield None
            steps, paused = 0, position
        if in_string:
            position = end_of(_IN_STRING, raw, position) + 1
            in_string = raw[position - 1 : position] != b'"'
            if in_string and position >= len(raw):
                raise ValueError("a string does not end")
            position -= in_string
            continue
        found = (_AT_TOP if depth == 1 else _INSIDE).match(raw, position)
        assert found is not None
        position, token = found.end(), found[1]
        if token == b'"':
            in_string = True
        elif token in _CLOSING:
            depth += 1
        elif token == b",":
            yield _trimmed(raw, number, begin, position - 1)
            begin = position
            number += 1
        elif token:
            depth -= 1
        else:
            raise ValueError("a bracket is not closed")
    if token != closing or end_of(_SPACES, raw, position) != len(raw):
        raise ValueError("its last bracket is another one, or is not the end")
    last = _trimmed(raw, number, begin, position - 1)
    if number > 1 or last.begin < last.end:
        yield last


def _trimmed(raw: bytes, number: int, begin: int, end: int) -> Slice:
    """Return the slice without the white space around it."""
    begin = min(end_of(_SPACES, raw, begin), end)
    return Slice(number, begin, begin + len(raw[begin:end].rstrip(SPACE)))
