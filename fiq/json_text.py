"""JSON text that is cut and measured without being parsed: slices of an array or object, parts of a long text, depth.

*Slices* are where the elements of an array, or the members of an object, begin and end, so that these can be kept byte
for byte. Only strings, brackets and commas are looked at; whether the slices are JSON shows when they are parsed.

*Parts* are for a text that would take too much memory parsed as a whole: a parser makes some 40 bytes of each byte of
small objects. They are parsed one after the other, and the whole text is JSON if and only if each of them is.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import orjson

#: bytes between two cuts of :func:`parts`
PART_BYTES = 2**15
#: a step of :func:`slices` takes at most some milliseconds; after so many steps or bytes it lets its caller pause
_PAUSE_STEPS, PAUSE_BYTES = 1000, 2**16
SPACE = b" \t\r\n"

# groups are atomic, too: before Python 3.11.5 a possessive repeat ends where its last try failed (gh-106052)
_STRING = rb'"(?>[^"\\]++|\\.)*+"'
#: a string without very many escapes; what follows a string's first quote, until its end or so many escapes
_SHORT_STRING = rb'"[^"\\]*+(?>\\.[^"\\]*+){0,200}+"'
_IN_STRING = re.compile(rb'[^"\\]*+(?>\\.[^"\\]*+){0,200}+', re.DOTALL)
#: an array or object without others in it
_FLAT = rb'[\[{][^"\[\]{}]*+(?>%b[^"\[\]{}]*+){0,20}+[\]}]' % _SHORT_STRING
#: the next token outside strings: at the top level a comma counts, deeper only brackets; a quote after many strings
_AT_TOP, _INSIDE = (
    re.compile(rb"[^%b]*+(?>(?>%b|%b)[^%b]*+){0,50}+([%b]?)" % (stop, _SHORT_STRING, _FLAT, stop, stop), re.DOTALL)
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


# -- brackets and commas ----------------------------------------------------------------------------------------------

#: everything up to a string that does not end; the same up to the next comma outside strings
_OUTSIDE, _TO_COMMA = (re.compile(rb"(?>[^%b]++|%b)*+" % (stop, _STRING), re.DOTALL) for stop in (b'"', b'",'))
_STRINGS = re.compile(_STRING, re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_COMMA = ord(",")
_SAME = bytes.maketrans(b"{}", b"[]")
_STEP = {ord("["): 1, ord("]"): -1}
#: innermost levels of brackets that are removed before the others are looked at one by one
_INNERMOST = 3


def deeper_than(raw: bytes, limit: int) -> bool:
    """Return whether objects and arrays of *raw*, a valid JSON text, are nested more than *limit* deep.

    The strings are removed (brackets in them mean nothing), then the innermost levels, which are most brackets, and the
    others are counted one by one.
    """
    places = (0, *_cuts(raw, PART_BYTES), len(raw)) if len(raw) > PART_BYTES else (0, len(raw))
    brackets = b"".join(_brackets(raw[begin:end]) for begin, end in pairwise(places)).translate(_SAME)
    removed = min(_INNERMOST, limit)
    for _ in range(removed):
        brackets = brackets.replace(b"[]", b"")
    depth = removed
    for bracket in brackets:
        depth += _STEP[bracket]
        if depth > limit:
            return True
    return False


def _cuts(raw: bytes, size: int) -> Iterator[int]:
    """Yield where commas outside strings are, at least *size* bytes apart."""
    comma = end_of(_TO_COMMA, raw, end_of(_OUTSIDE, raw, 0, size))
    while comma < len(raw) and raw[comma] == _COMMA:
        yield comma
        comma = end_of(_TO_COMMA, raw, end_of(_OUTSIDE, raw, comma + 1, comma + 1 + size))


def _brackets(text: bytes) -> bytes:
    """Return the brackets of *text* outside strings; meanwhile each text between two strings takes some 50 bytes."""
    if not any(bracket in text for bracket in (b"[", b"]", b"{", b"}")):
        return b""
    return _STRINGS.sub(b"", text).translate(None, _NOT_BRACKETS)


# -- parts ------------------------------------------------------------------------------------------------------------
#
# What JSON may follow a comma depends only on the arrays and objects that are open there. So a text can be cut at any
# comma: before what follows it another text opens the same ones, with an element and the comma; after what precedes it
# another text adds the comma and an element, and closes them. A parser comes to the comma in the same state as in the
# whole, and so finds the same errors.

_CLOSED = bytes.maketrans(b"[{", b"]}")
_OPENING = frozenset(b"[{")
#: the parser refuses a text with more levels
_MOST_LEVELS = 1024


class Part(NamedTuple):
    """A part of a JSON text, as a text of its own.

    Members of the outermost object that begin in the part are members of the part's object, which may have one more,
    with an empty name. A value that is cut, too, ends or begins with a 0 that is not of the text.

    Attributes:
        text: with what opens and closes the arrays and objects around the part.
        begin: of the part in the whole text.
        lead: bytes of *text* before the part.
    """

    text: bytes
    begin: int
    lead: int


def parts(raw: bytes, size: int = PART_BYTES) -> Iterator[Part]:
    """Yield *raw* in parts of about *size* bytes; a string, and containers of one element each, are never cut."""
    begin, lead, opened = 0, b"", bytearray()
    for comma in _cuts(raw, size):
        if not _follow(raw[begin:comma], opened):
            break
        yield Part(lead + raw[begin:comma] + _close(opened), begin, len(lead))
        begin, lead = comma + 1, _open(opened)
    yield Part(lead + raw[begin:], begin, len(lead))


def _follow(text: bytes, opened: bytearray) -> bool:
    """Apply the brackets in *text* to those that are *opened*.

    Return False if none is left, as no comma may follow, or if there are more than the parser takes.
    """
    begin = 0
    while begin < len(text):  # a text that is not valid may have very many strings
        end = end_of(_OUTSIDE, text, begin, begin + PART_BYTES)
        if end == begin:  # one longer string
            end = end_of(_STRINGS, text, begin)
        brackets = _brackets(text[begin:end])
        for _ in range(_INNERMOST):
            brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
        for bracket in brackets:
            if bracket in _OPENING:
                opened.append(bracket)
            elif len(opened) > 1:
                opened.pop()
            else:
                return False
        if len(opened) > _MOST_LEVELS:
            return False
        begin = end
    return bool(opened)


def _open(opened: bytearray) -> bytes:
    innermost = b"[0," if opened.endswith(b"[") else b'{"":0,'
    return bytes(opened[:-1]).replace(b"{", b'{"":') + innermost


def _close(opened: bytearray) -> bytes:
    element = b",0" if opened.endswith(b"[") else b',"":0'
    return element + bytes(opened[::-1]).translate(_CLOSED)
