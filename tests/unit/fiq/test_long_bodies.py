"""A long body is checked in parts, which says the same as checking it as a whole."""

from __future__ import annotations

import json
import tracemalloc
from functools import partial
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiq import event
from fiq.event import OWN_MEMBERS, InvalidBodyError, NotJsonError, check_depth, check_json, read_body
from fiq.json_text import parts

#: own members in every spelling, and others
NAMES = st.sampled_from([*OWN_MEMBERS, "", "0", "event", *(name.upper() for name in OWN_MEMBERS)])


class Members(tuple[tuple[str, Any], ...]):
    """An object whose names may occur more than once."""

    __slots__ = ()


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(0, 9) | st.sampled_from(["", "c-1", *OWN_MEMBERS, '",{"[', "é"]),
    lambda inner: st.lists(inner, max_size=4) | st.lists(st.tuples(NAMES, inner), max_size=4).map(Members),
    max_leaves=12,
)


def text_of(value: Any, escaped: bool) -> str:
    if isinstance(value, Members):
        return "{" + ",".join(f"{_name(name, escaped)}: {text_of(one, escaped)}" for name, one in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(text_of(one, escaped) for one in value) + "]"
    return json.dumps(value)


def _name(name: str, escaped: bool) -> str:
    return '"' + "".join(f"\\u{ord(one):04x}" for one in name) + '"' if escaped else json.dumps(name)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Return a body with or without an event type, most of them valid."""
    members = draw(st.lists(st.tuples(NAMES, VALUES), max_size=8))
    if draw(st.booleans()):
        members.insert(draw(st.integers(0, len(members))), ("event_type", "A"))
    raw = text_of(Members(members), draw(st.booleans())).encode()
    if draw(st.booleans()):
        at = draw(st.integers(0, len(raw)))
        raw = raw[:at] + draw(st.sampled_from([b"", b",", b"}", b"]", b'"', b"\n", b"\xff", b"NaN"])) + raw[at + 1 :]
    return raw


def result_of(raw: bytes) -> object:
    """Return what reading *raw* gives: its members, or the error with its place."""
    try:
        stored, found = read_body(raw)
    except NotJsonError as error:
        return str(error), error.offset
    except InvalidBodyError as error:
        return str(error)
    members = {name: found[name] for name in OWN_MEMBERS if name in found}
    return stored, {name: type(one)() if isinstance(one, list | dict) else one for name, one in members.items()}


@given(bodies(), st.integers(1, 60))
def test_a_body_in_parts_is_the_body_as_a_whole(raw: bytes, size: int) -> None:
    """Its members, its stored bytes, or its error: which one, and at which byte."""
    whole = result_of(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(event, "_LONG_BYTES", -1)
        patch.setattr(event, "parts", partial(parts, size=size))
        assert whole == result_of(raw)


def long(*members: bytes) -> bytes:
    """Return a long event with these members, two of them far apart."""
    filler = b'"x":[' + b'{"":0},' * 20_000 + b"0]"
    return b'{"event_type":"A",' + members[0] + b"," + filler + b"," + members[1] + b"}"


@pytest.mark.parametrize("name", OWN_MEMBERS[1:])
def test_a_name_that_occurs_twice_is_found_however_far_apart_it_is(name: str) -> None:
    """Also if one of them is written with an escape."""
    plain, escaped = f'"{name}":"c"'.encode(), f'"\\u{ord(name[0]):04x}{name[1:]}":"c"'.encode()
    for other in (plain, escaped):
        with pytest.raises(InvalidBodyError, match=f"^{name} occurs more than once"):
            read_body(long(plain, other))
    assert "c" == read_body(long(plain, b'"y":{' + plain + b"," + plain + b"}"))[1][name]


@pytest.mark.parametrize("part", [b'{"":0},', b"[0],", b"0,", b'"",', b"1.5,", b'{"payload":0},', b"[[]],"])
def test_a_long_body_takes_little_memory(part: bytes) -> None:
    """Parsed whole, small objects take 40 times their text; own names within it are no exception."""
    raw = b'{"event_type":"A","payload":[' + part * (2**20 // len(part)) + b"0]}"
    tracemalloc.start()
    try:
        read_body(raw)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
        check_depth(raw, 100)
        check_json(raw, "")
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()
    orjson.loads(raw)


@pytest.mark.parametrize(
    "raw",
    [
        b'["" ' + b'""::' * 2**18 + b",0]",
        b"[0] " + b'"a" ' * 2**18 + b",",
        b"[" + b'[[""]]' * 2**17 + b",0]",
        b"[" * 2**20 + b",0]",
    ],
)
def test_a_long_text_that_is_not_json_takes_little_memory(raw: bytes) -> None:
    """The parser itself takes 12 times the text for a moment."""
    tracemalloc.start()
    try:
        with pytest.raises(NotJsonError) as refused:
            read_body(raw)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()
    with pytest.raises(orjson.JSONDecodeError) as whole:
        orjson.loads(raw)
    assert whole.value.pos == refused.value.offset
