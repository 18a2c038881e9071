"""The frames between ingest and owners: what is written is read, and anything else is malformed."""

from __future__ import annotations

import struct

import pytest

from services.log.zeromq import wire
from services.log.zeromq.wire import Done, MalformedMessageError, State

STATE = State("i", 7, 2, 100, 1 << 20, "main", "v-1", 16, {"host": "h", "pid": "1"})


def test_a_state_is_read_as_it_was_written() -> None:
    """With all that it says of the owner."""
    kind, data = wire.encode_state(STATE)
    assert (wire.STATE, STATE) == (kind, wire.decode_state(data))


def test_events_are_read_as_they_were_written() -> None:
    """Several in one message, in their order, bodies byte for byte."""
    events = [(1, "c-1", {"a": "b"}, b'{"x":1}'), (2**40, "c-2", {}, b"\x00\xff")]
    frames = [wire.EVENTS, *(frame for one in events for frame in wire.encode_event(*one))]
    assert events == list(wire.decode_events(frames))


def test_outcomes_questions_and_answers_are_read_as_they_were_written() -> None:
    """One message for all outcomes of a round."""
    done = [(1, 10, Done.STORED), (2, 3, Done.DUPLICATE), (3, 0, Done.REFUSED)]
    assert done == list(wire.decode_done(wire.encode_done(done)[1]))
    kind, number, name, question = wire.encode_ask(9, "find", b"{}")
    assert (wire.ASK, b"find", b"{}") == (kind, name, question)
    assert (9, 503, b"why") == wire.decode_reply(wire.encode_reply(number, 503, b"why"))
    assert ("h/1", True) == wire.decode_hello(wire.encode_hello("h/1", watches=True)[1])


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"instance":1}', b'{"instance":"i"}'])
def test_a_malformed_state_is_refused(data: bytes) -> None:
    """A field is missing, or of another type."""
    with pytest.raises(MalformedMessageError):
        wire.decode_state(data)


@pytest.mark.parametrize(
    "frames",
    [
        [b"E", b"1234"],
        [b"E", b"123", b'["c",{}]', b"{}"],
        [b"E", struct.pack(">Q", 1), b"{}", b"{}"],
        [b"E", struct.pack(">Q", 1), b'["c",[]]', b"{}"],
        [b"E", struct.pack(">Q", 1), b'["c",{},1]', b"{}"],
        [b"E", struct.pack(">Q", 1), b"\xff", b"{}"],
    ],
)
def test_malformed_events_are_refused(frames: list[bytes]) -> None:
    """Frames are missing, or a head is not what it should be."""
    with pytest.raises(MalformedMessageError):
        list(wire.decode_events(frames))


@pytest.mark.parametrize("data", [b"1", struct.pack(">QQB", 1, 1, 9)])
def test_malformed_outcomes_are_refused(data: bytes) -> None:
    """Cut off, or of an unknown kind."""
    with pytest.raises(MalformedMessageError):
        list(wire.decode_done(data))
