"""Trace Context: what is handed on, and what is dropped."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiq.event import MAX_STATE, Event, Trace, decode, read_trace, trace_of_message
from services.log.jetstream.connection import HEADERS_BYTES
from services.log.jetstream.publisher import headers_bytes, hpub

ID, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{ID}-{SPAN}-01"
EVENT = Event("c-1", UUID(int=1), 1, b'{"event_type":"A"}')

#: near misses of a traceparent, and anything else
parents = st.text() | st.from_regex(r"\A[0-9a-fA-F]{1,3}-[0-9a-f]{31,33}-[0-9a-f]{15,17}-[0-9a-f]{1,3}(-.*)?\Z")
#: near misses of a tracestate, and anything else
states = st.text() | st.lists(st.from_regex(r"\A[ \t]*[a-z0-9@_*/-]{1,20}=[ -~]{0,20}[ \t]*\Z")).map(",".join)


@pytest.mark.parametrize("flags", ["00", "01", "02", "03", "ff"])
def test_a_valid_parent_is_handed_on_unchanged(flags: str) -> None:
    """Also with flags that the specification does not define."""
    trace = read_trace([f"00-{ID}-{SPAN}-{flags}"], [])
    assert trace is not None
    assert (f"00-{ID}-{SPAN}-{flags}", ID, flags in ("01", "03", "ff")) == (trace.parent, trace.trace_id, trace.sampled)


@pytest.mark.parametrize(
    "value",
    [
        "",
        PARENT.upper(),
        f"ff-{ID}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{ID}-{'0' * 16}-01",
        f"00-{ID[1:]}-{SPAN}-01",
        f"00-{ID}-{SPAN}-1",
        f"00-{ID}-{SPAN}-zz",
        f"{PARENT}-more",
        f"{PARENT}-",
        f"{PARENT}x",
        f"01-{ID}-{SPAN}-01x",
        f"{PARENT}\n",
        f"{PARENT}\r\nNats-Msg-Id: other",
        f"cc-{ID}-{SPAN}-01-\r\nNats-Msg-Id: other",
        f"00-{'١' * 32}-{SPAN}-01",
    ],
)
def test_an_invalid_parent_is_dropped_and_its_state_with_it(value: str) -> None:
    """The specification: a vendor that cannot read the one must not read the other."""
    assert read_trace([value], ["a=1"]) is None


def test_two_parents_are_none() -> None:
    """Which of them would be right?"""
    assert read_trace([PARENT, PARENT], []) is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (f"01-{ID}-{SPAN}-03", f"00-{ID}-{SPAN}-01"),
        (f"cc-{ID}-{SPAN}-00-what-the-future-brings", f"00-{ID}-{SPAN}-00"),
    ],
)
def test_of_a_later_version_only_what_is_known_is_handed_on(value: str, expected: str) -> None:
    """As version 00, with the flag that this version has."""
    assert Trace(expected) == read_trace([value], [])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["a=1"], "a=1"),
        (["a=1, b=2\t,\tc=3"], "a=1,b=2,c=3"),
        (["a=1", "t1@b=x y"], "a=1,t1@b=x y"),
        (["a=1,,b=2,"], "a=1,b=2"),
        ([","], ""),
        (["a=1,a=2"], ""),
        (["A=1"], ""),
        (["a=1,b"], ""),
        (["a="], ""),
        (["a=é"], ""),
        (["a=\x00"], ""),
        (["a=1\r\nNats-Msg-Id: other"], ""),
        ([f"a={'x' * (MAX_STATE - 256 - 2)},b={'y' * 253}"], f"a={'x' * (MAX_STATE - 256 - 2)},b={'y' * 253}"),
        ([f"a={'x' * (MAX_STATE - 256 - 2)},b={'y' * 254}"], ""),
        ([f"a={'x' * 256}"], f"a={'x' * 256}"),
        ([f"a={'x' * 257}"], ""),
        (["1=1"], ""),
        ([",".join(f"k{number}=v" for number in range(32))], ",".join(f"k{number}=v" for number in range(32))),
        ([",".join(f"k{number}=v" for number in range(33))], ""),
    ],
)
def test_a_state_is_handed_on_whole_or_not_at_all(values: list[str], expected: str) -> None:
    """Several headers are one list; the limits are ours and the specification's. The parent stays in any case."""
    assert Trace(PARENT, expected) == read_trace([PARENT], values)


@given(st.lists(parents, max_size=2), st.lists(states, max_size=3))
def test_nothing_that_arrives_makes_a_header_of_its_own(given_parents: list[str], given_states: list[str]) -> None:
    """Whatever a client sends: none, or headers of printable ASCII within their bounds that read the same again."""
    _check(read_trace(given_parents, given_states))


@given(st.lists(states, max_size=3))
def test_no_state_breaks_out_of_its_header(given_states: list[str]) -> None:
    """The same with a parent that is valid always."""
    trace = read_trace([PARENT], given_states)
    assert trace is not None
    _check(trace)


def _check(trace: Trace | None) -> None:
    if trace is None:
        return
    headers = trace.headers()
    assert headers.keys() <= {"traceparent", "tracestate"}
    assert all(value.isascii() and value.isprintable() for value in headers.values())
    assert (55, True) == (len(trace.parent), len(trace.state) <= MAX_STATE)
    assert trace == trace_of_message(headers)
    hpub("fi.events.00.c", "", headers, b"")


def test_a_trace_is_no_part_of_an_event() -> None:
    """Two deliveries of one event under two traces are one event, wherever they are compared."""
    one, other = (Event("c", UUID(int=1), 1, b"{}", trace) for trace in (Trace(PARENT), None))
    assert (one, hash(one)) == (other, hash(other))


def test_a_message_carries_its_event_s_trace() -> None:
    """And the persister reads it back; headers that another publisher spoiled leave the event what it is."""
    event = Event(EVENT.consultation, EVENT.event_id, 1, EVENT.body, Trace(PARENT, "a=1"))
    headers = event.headers()
    assert (PARENT, "a=1") == (headers["traceparent"], headers["tracestate"])
    assert event.trace == decode("c-1", headers, event.body).trace
    spoiled = decode("c-1", headers | {"traceparent": "00-x"}, event.body)
    assert (event, None) == (spoiled, spoiled.trace)


def test_without_a_trace_a_message_has_no_further_header() -> None:
    """Messages without a trace stay as small as before."""
    assert {"Nats-Msg-Id", "Fi-Received-Ns"} == EVENT.headers().keys()


def test_the_longest_headers_fit_into_what_is_kept_free_for_them() -> None:
    """FI_MAX_EVENT_BYTES and the broker's max_payload are compared at start with this in mind."""
    event = Event("c" * 128, UUID(int=1), 2**63 - 1, b"", Trace(PARENT, "a" * MAX_STATE))
    batch = {"Nats-Batch-Id": "0" * 32, "Nats-Batch-Sequence": "1000", "Nats-Batch-Commit": "1"}
    assert headers_bytes(event.headers() | batch) <= HEADERS_BYTES
