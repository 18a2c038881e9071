"""The parts of a JSON text stand where a parser finds them, and are its very bytes."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ingest.formats import slice_array, slice_object

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
    assert {name: orjson.loads(part) for name, part in slice_object(raw).items()} == orjson.loads(raw)


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
    """A parser would make 2.5 of it; of members of one name the last counts, as for parsers."""
    assert slice_object(raw)["a"] == b"2.50"


def test_deep_and_long_texts_take_no_time_to_speak_of() -> None:
    """No step looks at a byte twice."""
    deep = b"[" * 500 + b"]" * 500
    strings = b'["' + b'\\"[' * 300_000 + b'"]'
    assert [len(part) for part in slice_array(b"[" + deep + b"," + strings + b"]")] == [len(deep), len(strings)]
