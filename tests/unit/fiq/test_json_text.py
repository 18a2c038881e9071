"""The parts of a JSON text stand where a parser finds them, and are its very bytes."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiq.json_text import slice_array, slice_object, slices

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
