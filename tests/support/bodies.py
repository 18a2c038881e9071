"""Bodies as hypothesis draws them, each with a mark by which it is found wherever it has got to."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

T = TypeVar("T")

#: stands in everything that is sent, and must stand in no line of a log, no metric and no error
MARK = "Sxcrxt"
_TEXT = st.text(max_size=20).map(lambda text: MARK + text)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=True) | _TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4),
    max_leaves=12,
)
#: bodies that are too short for a mark, and tell nothing
BARE = (b"", b"null", b"-17", b"1e999", b"NaN", b"{}", b"[]", b'""', b"\xef\xbb\xbf{}")


def _encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


#: JSON of every kind, whole or cut off, deep, with odd numbers and characters, and no JSON at all
BODIES = st.one_of(
    st.binary(max_size=300).map(lambda raw: raw + MARK.encode()),
    st.binary(max_size=300).map(lambda raw: MARK.encode() + raw),
    st.lists(JSON, max_size=4).map(lambda values: _encoded([MARK, *values])),
    _TEXT.map(_encoded),
    st.fixed_dictionaries({"event_type": JSON, "payload": JSON}).map(lambda value: _encoded({MARK: 1, **value})),
    st.fixed_dictionaries({"event_type": _TEXT, "payload": JSON}).map(_encoded),
    st.tuples(JSON, st.integers(9, 80)).map(
        lambda both: _encoded({MARK: 1, "event_type": MARK, "p": both[0]})[: both[1]]
    ),
    st.integers(1, 3000).map(lambda depth: b'{"event_type":"Sxcrxt","p":' + b"[" * depth + b"]" * depth + b"}"),
    st.sampled_from(
        [
            *BARE,
            b'\xef\xbb\xbf{"event_type":"Sxcrxt"}',
            b'{"event_type":"Sxcrxt\\ud800"}',
            b'{"event_type":"Sxcrxt","a":1e999}',
            b'{"event_type":"Sxcrxt","a":"\xff"}',
            b'{"event_type":"Sxcrxt","event_type":""}',
        ]
    ),
)


def drawn(strategy: st.SearchStrategy[T], count: int) -> list[T]:
    """Return *count* examples of *strategy*."""
    found: list[T] = []

    @settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate])
    @given(strategy)
    def collect(example: T) -> None:
        found.append(example)

    collect()
    return found
