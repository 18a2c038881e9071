"""How deep a JSON text is nested."""

from __future__ import annotations

import tracemalloc
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiq import json_text
from fiq.json_text import deeper_than

#: strings that look like structure, too
TEXTS = st.text(alphabet='[]{}"\\a\n', max_size=8)
DOCUMENTS = st.recursive(
    st.none() | st.integers(0, 9) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=20,
)


def depth(document: Any) -> int:
    """Count what the function must find."""
    if isinstance(document, dict):
        return 1 + max(map(depth, document.values()), default=0)
    return 1 + max(map(depth, document), default=0) if isinstance(document, list) else 0


@given(DOCUMENTS, st.integers(1, 6), st.sampled_from([json_text.PART_BYTES, 5]))
def test_it_is_what_a_parser_finds(document: Any, limit: int, size: int) -> None:
    """Brackets in strings and in keys mean nothing, escaped quotes end none; a long text is measured in parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "PART_BYTES", size)
        assert (depth(document) > limit) == deeper_than(orjson.dumps(document), limit)


@pytest.mark.parametrize(("levels", "expected"), [(100, False), (101, True)])
def test_the_limit_itself_is_allowed(levels: int, expected: bool) -> None:
    """However many shallow arrays the text has."""
    raw = b"[" + b"[]," * 500 + b"[" * (levels - 1) + b"]" * levels
    assert expected == deeper_than(raw, 100)


def test_the_parser_itself_takes_1024_levels() -> None:
    """So a limit below that is what counts."""
    orjson.loads(b"[" * 1024 + b"]" * 1024)
    with pytest.raises(orjson.JSONDecodeError):
        orjson.loads(b"[" * 1025 + b"]" * 1025)


def test_a_long_string_takes_no_memory_of_its_own() -> None:
    """A pattern that can backtrack keeps a mark for each character: 146 times the body (CPython 3.11)."""
    body = b"[" * 102 + b'"' + b"a" * 2**20 + b'"' + b"]" * 102
    tracemalloc.start()
    try:
        assert deeper_than(body, 101)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
