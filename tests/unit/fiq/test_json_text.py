"""The parts of a JSON text stand where a parser finds them, and are its very bytes; a long text is checked in parts."""

from __future__ import annotations

import json
import tracemalloc
from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiq.json_text import parts, slice_array, slice_object, slices

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text() | st.sampled_from(['"', "\\", '\\"[{,:}]']),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
SEPARATORS = st.sampled_from([(",", ":"), (" , ", " : "), (",\n\t", ":\r\n")])


@given(st.lists(VALUES), SEPARATORS, st.booleans())
def test_elements_are_the_texts_of_the_array(values: list[Any], separators: tuple[str, str], ascii_only: bool) -> None:
    """Each is valid by itself, in order, and all of them together are the array."""
    raw = json.dumps(values, separators=separators, ensure_ascii=ascii_only).encode("utf-8", "replace")
    found = list(slice_array(b" \n" + raw + b"\t"))
    assert [orjson.loads(part) for part in found] == orjson.loads(raw)
    inner = separators[0].encode()
    assert b"[" + inner.join(found) + b"]" == raw


@given(st.dictionaries(st.text(), VALUES), SEPARATORS)
def test_members_are_the_texts_of_the_object(values: dict[str, Any], separators: tuple[str, str]) -> None:
    """By the names that a parser reads, escapes resolved."""
    raw = json.dumps(values, separators=separators).encode()
    if b"\\ud" in raw:
        return  # half a surrogate pair is no text
    assert {name: orjson.loads(part) for name, part in slice_object(raw)} == orjson.loads(raw)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":1.10,"a":2.50}',
        b'{"\\u0061":2.50}',
        b' { "a" : 2.50 } ',
        b'{"b":{"a":[",",{"a":"}"}]},"a":2.50,"c":"\\\\"}',
    ],
)
def test_a_number_keeps_its_form(raw: bytes) -> None:
    """A parser would make 2.5 of it."""
    assert [part for name, part in slice_object(raw) if name == "a"][-1] == b"2.50"


def test_deep_and_long_texts_take_no_time_to_speak_of() -> None:
    """No step looks at a byte twice."""
    deep = b"[" * 500 + b"]" * 500
    strings = b'["' + b'\\"[' * 300_000 + b'"]'
    many = b'{"a":[' + b'"",' * 300_000 + b'"]"]}'
    parts = [deep, strings, many]
    assert [len(part) for part in slice_array(b"[" + b",".join(parts) + b"]")] == [len(part) for part in parts]


@pytest.mark.parametrize("part", [b"[0],", b'"",', b'"\\"\\"\\"",', b'"' + b"\\n" * 5000 + b'",', b"{},"])
def test_long_texts_are_sliced_in_short_steps(part: bytes) -> None:
    """The caller can let other requests go on: between two pauses some 64 KiB are looked at, however they look."""
    raw = b"[[" + part * (2**20 // len(part)) + b"0]]"
    assert len(raw) / 2**17 <= sum(one is None for one in slices(raw))


@pytest.mark.parametrize(
    "raw",
    [
        *(
            b"",
            b" ",
            b"1",
            b'"a"',
            b"[",
            b"[1",
            b"[1]]",
            b"[1] 2",
            b"[1}",
            b'["a',
            b'["a\\',
            b'["a\\"',
            b"[[1]",
            b'[{"a":"]"}',
        ),
        *(b'["' + b"\\n" * 2000, b'["' + b"\\n" * 2000 + b"\\", b"[" + b'"",' * 200),
    ],
)
def test_a_text_that_does_not_end_as_an_array_is_refused(raw: bytes) -> None:
    """Whatever it is cut off in."""
    with pytest.raises(ValueError, match=r"\w"):
        list(slices(raw))


@given(st.binary(max_size=40) | st.text(alphabet='[]{}",\\ 1a').map(str.encode))
def test_any_bytes_are_sliced_or_refused(raw: bytes) -> None:
    """If each slice is JSON, the whole is; if the whole is, the slices are its elements."""
    try:
        parts = list(slice_array(raw))
    except ValueError:
        parts = None
    assert (parts is not None and raw.strip()[:1] == b"[" and all(map(is_json, parts))) == isinstance(parsed(raw), list)


def is_json(raw: bytes) -> bool:
    return parsed(raw) is not None or raw == b"null"


def parsed(raw: bytes) -> Any:
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None


# -- parts ------------------------------------------------------------------------------------------------------------

#: texts that are JSON, nearly JSON, or nothing like it; in UTF-8 or not
TOKENS = [
    "[",
    "]",
    "{",
    "}",
    ",",
    ":",
    '"',
    "\\",
    '"a"',
    "é",
    "😀",
    " ",
    "\n",
    "1",
    "-0.5e3",
    "null",
    "NaN",
    "nul",
    "\0",
]
TEXTS = (
    VALUES.map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    | st.lists(st.sampled_from([*TOKENS, "01", "1e999", '"\\ud800"', '"\\u00e9"', "\ufeff"]))
    .map("".join)
    .map(str.encode)
    | st.binary(max_size=20)
)
SIZES = st.integers(1, 40)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Return a text in which a few bytes are replaced by others, or are missing."""
    text = draw(TEXTS)
    for _ in range(draw(st.integers(0, 3))):
        at, length = draw(st.integers(0, len(text))), draw(st.integers(0, 3))
        text = text[:at] + draw(st.sampled_from([b"", *map(str.encode, TOKENS), b"\xff"])) + text[at + length :]
    return text


def error_of(raw: bytes) -> tuple[str, int] | None:
    """Return what the parser finds wrong, and at which byte; None for JSON in UTF-8."""
    try:
        orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        return error.msg, len(error.doc[: error.pos].encode())
    return None


@given(damaged(), SIZES)
def test_a_text_is_json_if_each_of_its_parts_is_and_has_the_same_error_at_the_same_byte(raw: bytes, size: int) -> None:
    """The first one: the parser comes to each part in the state in which it comes there in the whole."""
    errors = ((part, error_of(part.text)) for part in parts(raw, size))
    found = next(((part.begin - part.lead + error[1], error[0]) for part, error in errors if error is not None), None)
    expected = error_of(raw)
    if expected is not None and "UTF-8" in expected[0]:
        assert found is not None  # elsewhere in the text, perhaps
    else:
        assert (None if expected is None else expected[::-1]) == found


@given(VALUES, SIZES)
def test_parts_are_the_bytes_between_commas(value: Any, size: int) -> None:
    """At least so many each, but for the last."""
    raw = json.dumps(value).encode()
    found = list(parts(raw, size))
    for one, following in pairwise(found):
        own = raw[one.begin : following.begin - 1]
        assert own == one.text[one.lead :][: len(own)]
        assert len(own) >= size
        assert b"," == raw[following.begin - 1 : following.begin]
    assert [0, raw[found[-1].begin :]] == [found[0].begin, found[-1].text[found[-1].lead :]]


@pytest.mark.parametrize(
    "raw",
    [
        b"[" + b'{"":0},' * 150_000 + b"0]",
        b"[" + b"[[]]," * 200_000 + b"0]",
        b'{"a":{"b":[' + b"1.5," * 250_000 + b"0]}}",
        b"[" + b'"",' * 350_000 + b"0]",
        b'{"a":[' + b'"\\"",' * 200_000 + b"0]}",
        (b"[" * 500 + b"]" * 500 + b",") * 1000,
    ],
)
def test_no_part_is_long(raw: bytes) -> None:
    """Whatever the text is made of, a parser has little of it in memory."""
    assert max(len(part.text) for part in parts(b"[" + raw + b"]", 2**15)) < 5 * 2**15


@pytest.mark.parametrize("levels", [1024, 1025])
def test_parts_are_as_deep_as_the_text(levels: int) -> None:
    """So the parser's own limit is the same, and is reached at the same byte."""
    raw = b"[0," * (levels // 2) + b'{"a":0,"b":' * (levels - levels // 2) + b"0" + b"}" * (levels - levels // 2)
    raw += b",1]" * (levels // 2)
    errors = [(part, error_of(part.text)) for part in parts(raw, 100)]
    found = [(error[0], part.begin - part.lead + error[1]) for part, error in errors if error is not None]
    assert error_of(raw) == (found[0] if found else None)
    assert (levels > 1024) == bool(found)


def test_a_string_is_not_cut() -> None:
    """Its commas and brackets mean nothing, nor do escaped quotes end it."""
    string = b'"' + b',[{\\"' * 10_000 + b'"'
    assert [b'["a",0]', b"[0," + string + b",0]", b"[0,1]"] == [
        part.text for part in parts(b'["a",' + string + b",1]", 3)
    ]


def test_many_escapes_take_no_memory_of_their_own() -> None:
    """A pattern that can backtrack would keep a mark for each."""
    raw = b'["' + b'\\"' * 2**19 + b'",' + b'"",' * 2**18 + b"0]"
    tracemalloc.start()
    try:
        assert sum(1 for _ in parts(raw)) > 2
        assert tracemalloc.get_traced_memory()[1] < 5 * 2**20
    finally:
        tracemalloc.stop()


def test_strings_are_not_cut_by_any_python() -> None:
    """Python before 3.11.5 misreads some patterns that later ones read well: services run on the distribution's own."""
    assert [b'["\\",["]'] == [part.text for part in parts(b'["\\",["]', 4)]
    assert [b"[[]]"] == list(slice_array(b"[[[]]]"))
