"""What the follower makes of the broker's messages, and how much it asks for; the rest is tested on a real cluster."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from services.log.errors import LogUnavailableError
from services.log.jetstream.connection import Received
from services.log.jetstream.follower import MAX_BYTES, MAX_EVENTS, Budget, JetStreamFollower, Room, _Buffer, _Pulls
from services.log.protocol import Delivery, LogIdentity

#: what may be held in all, when nothing else is said
ALL = 100
ALL_SIZE = 1000


@pytest.fixture
def follower() -> JetStreamFollower:
    nc = cast("Any", SimpleNamespace(max_payload=2**20, stats={"reconnects": 0}))
    return JetStreamFollower(nc, "main", 0, LogIdentity("fi-events", ""), budget=Budget(64, 0))


def delivered(
    follower: JetStreamFollower, number: int, *, sequence: int = 0, pending: int = 0, message_id: str = ""
) -> None:
    reply = f"$JS.ACK.fi-events.fi-workers-main-00-1.1.{sequence or number + 100}.{number}.1.{pending}"
    headers = {"Nats-Msg-Id": message_id}
    follower._delivered(Received("fi.events.0.c1", reply, b"{}", headers))


def heartbeat(follower: JetStreamFollower, sent: int, looked: int = 0) -> str:
    headers = {
        "Status": "100",
        "Description": "Idle Heartbeat",
        "Nats-Last-Consumer": str(sent),
        "Nats-Last-Stream": str(looked),
    }
    follower._status(Received("inbox.1", "", b"", headers))
    return follower._doubt


# -- deliveries and statuses ------------------------------------------------------------------------------------------


def test_every_event_is_told_of_and_can_be_taken_at_once(follower: JetStreamFollower) -> None:
    """What is idle is written at once, so nothing may be added to the time that the broker and the disk take."""
    told: list[int] = []
    follower._on_events = lambda: told.append(follower.ready)
    delivered(follower, 1)
    delivered(follower, 2)
    assert [1, 2] == told
    assert [101, 102] == [one.sequence for one in follower.take(max_events=10, max_bytes=2**20)]
    assert [] == follower.take(max_events=10, max_bytes=2**20)


def test_what_waits_is_what_is_held_and_what_the_log_has_besides(follower: JetStreamFollower) -> None:
    """Also what was taken, until it is done."""
    delivered(follower, 1, pending=7)
    delivered(follower, 2, pending=6)
    follower.take(max_events=1, max_bytes=2**20)
    assert (1, 8) == (follower.ready, follower.waiting)


def test_what_a_new_cursor_delivers_again_is_not_counted_twice(follower: JetStreamFollower) -> None:
    """It is pending there until it has come."""
    for number in (1, 2, 3):
        delivered(follower, number, pending=10 - number)
    follower._next_delivery, follower._again, follower._pending = 1, 0, 10  # as a repair does
    assert 10 == follower.waiting
    for number in (1, 2, 3, 4):
        delivered(follower, number, pending=10 - number)
        assert 10 == follower.waiting
    assert 4 == follower.ready


def test_another_event_in_the_place_of_one_that_was_handed_out_begins_again(follower: JetStreamFollower) -> None:
    """The log was set back while the process ran: what is not committed is forgotten, and the file is compared."""
    delivered(follower, 1, sequence=101, message_id="a")
    follower._next_delivery, follower._handed_out = 1, follower._last  # as a repair does
    delivered(follower, 1, sequence=101, message_id="a")
    assert follower._error is None
    follower._next_delivery, follower._handed_out = 1, follower._last
    delivered(follower, 1, sequence=101, message_id="b")
    assert isinstance(follower._error, LogUnavailableError)


def test_a_heartbeat_shows_how_far_the_stream_holds_nothing_for_the_sink(follower: JetStreamFollower) -> None:
    """Only when all that was sent has come: what is under way may be before that."""
    delivered(follower, 1)
    heartbeat(follower, 2, looked=500)
    assert 0 == follower._empty_to
    delivered(follower, 2)
    heartbeat(follower, 2, looked=600)
    assert 600 == follower._empty_to


def test_a_heartbeat_that_agrees_raises_no_doubt(follower: JetStreamFollower) -> None:
    """All that was sent has come."""
    delivered(follower, 1)
    assert ["", ""] == [heartbeat(follower, 1), heartbeat(follower, 1)]


def test_a_heartbeat_may_overtake_messages_once(follower: JetStreamFollower) -> None:
    """Messages that are under way between two nodes: slowness is no loss."""
    delivered(follower, 1)
    assert not heartbeat(follower, 3)
    delivered(follower, 2)
    assert not heartbeat(follower, 4)
    delivered(follower, 3)
    delivered(follower, 4)
    assert not heartbeat(follower, 4)


def test_messages_that_have_not_come_by_the_next_heartbeat_are_lost(follower: JetStreamFollower) -> None:
    """Then a new cursor is made at what is committed."""
    delivered(follower, 1)
    assert ["", "gap"] == [heartbeat(follower, 3), heartbeat(follower, 3)]


def test_a_cursor_that_sent_less_than_came_is_another_one(follower: JetStreamFollower) -> None:
    """Its node came back without its memory, or an operator reset it."""
    delivered(follower, 1)
    delivered(follower, 2)
    assert heartbeat(follower, 1) == "gap"


def test_an_unknown_status_is_doubt(follower: JetStreamFollower) -> None:
    """A leadership change, a consumer that was deleted; also an end that does not say what is missing."""
    headers = {"Status": "409", "Description": "Leadership Change"}
    follower._status(Received("inbox.1", "", b"", headers))
    assert follower._doubt == "status"


# -- pulls ------------------------------------------------------------------------------------------------------------


def pulls(largest: int = 10) -> _Pulls:
    made = _Pulls(largest)
    made.begin("inbox")
    return made


def room(events: int = ALL, size: int = ALL_SIZE) -> Room:
    return Room(events, size, ALL, ALL_SIZE)


def send(these: _Pulls, of: Room) -> tuple[int, int, str]:
    pull = these.next(of)
    assert pull is not None
    these.sent(*pull[:2])
    return pull


def test_all_the_room_is_asked_for() -> None:
    """By events and by bytes."""
    assert (60, 700, "inbox.1") == send(pulls(), room(60, 700))


def test_little_room_is_not_asked_for_while_a_request_is_under_way() -> None:
    """Else each event that is done would be a request of its own."""
    these = pulls()
    send(these, room(50, 500))
    assert these.next(room(24, 500)) is None
    assert these.next(room(50, 249)) is None
    assert (25, 250, "inbox.2") == these.next(room(25, 250))


def test_without_a_request_any_room_is_asked_for() -> None:
    """A follower with no request of its own must not wait for others to return room, which may never happen."""
    assert (1, 10, "inbox.1") == pulls().next(room(1, 10))


def test_a_request_has_room_for_the_largest_message() -> None:
    """The broker would end it at once, again and again."""
    assert pulls(largest=10).next(room(50, 9)) is None


def test_no_request_is_larger_than_a_batch() -> None:
    """What it brings arrives in one go."""
    assert (MAX_EVENTS, MAX_BYTES, "inbox.1") == pulls().next(Room(10**6, 10**9, 10**6, 10**9))


def test_a_message_is_no_longer_promised_when_it_has_come() -> None:
    """It waits in the buffer then."""
    these = pulls()
    send(these, room())
    for _ in range(60):
        these.delivered(10)
    assert (40, 400) == (these.promised, these.promised_bytes)


def test_the_end_of_a_pull_does_not_count_as_the_arrival_of_its_messages() -> None:
    """A replicated consumer says "Batch Completed" long before it sends the batch."""
    these = pulls()
    send(these, room())
    these.ended(0, 100)
    assert 100 == these.promised


def test_what_a_pull_will_not_bring_is_no_longer_promised() -> None:
    """It expired, or its share of bytes was used up."""
    these = pulls()
    send(these, room())
    these.delivered(20)
    these.ended(49, 480)
    assert (50, 500) == (these.promised, these.promised_bytes)


def test_bytes_are_free_when_nothing_is_promised() -> None:
    """The broker's sizes and ours differ a little; that must not add up over the years."""
    these = pulls()
    send(these, room(1, 500))
    these.delivered(1)
    assert (0, 0) == (these.promised, these.promised_bytes)


# -- what is held ------------------------------------------------------------------------------------------------------


def delivery(sequence: int, size: int = 10) -> Delivery:
    return Delivery(sequence, "c1", None, b"x" * size, f"token-{sequence}")


def filled(*sizes: int) -> _Buffer:
    buffer = _Buffer()
    for sequence, size in enumerate(sizes, 1):
        buffer.put(delivery(sequence, size))
    return buffer


def test_a_batch_has_what_fits_in_order() -> None:
    """By number and by bytes."""
    buffer = filled(10, 10, 10, 10)
    assert [1, 2] == [taken.sequence for taken in buffer.take(2, 1000)]
    assert [3] == [taken.sequence for taken in buffer.take(2, 15)]
    assert 1 == len(buffer)
    assert [] == filled().take(2, 15)


def test_an_event_that_is_larger_than_a_batch_comes_alone() -> None:
    """It must not stand in the way for ever."""
    buffer = filled(100, 1)
    assert [1] == [taken.sequence for taken in buffer.take(10, 50)]


def test_what_is_taken_counts_until_it_is_done() -> None:
    """It is in memory until it is committed."""
    buffer = filled(10, 20, 30)
    buffer.take(2, 1000)
    assert (3, 60, 1) == (buffer.events, buffer.size, len(buffer))
    assert buffer.done()
    assert (1, 30, 1) == (buffer.events, buffer.size, len(buffer))
    assert not buffer.done()


def test_nothing_is_left_of_a_buffer_that_is_cleared() -> None:
    """Neither what waits nor what is in hand."""
    buffer = filled(10, 20)
    buffer.take(1, 1000)
    buffer.clear()
    assert (0, 0, 0, []) == (buffer.events, buffer.size, len(buffer), buffer.take(9, 9))
    assert not buffer.done()
