"""Pipelined pulls: what may be held is never promised twice."""

from __future__ import annotations

from services.eventlog.jetstream.budget import Room
from services.eventlog.jetstream.pulls import MAX_BYTES, MAX_EVENTS, Pull, Pulls

#: what may be held in all, when nothing else is said
ALL = 100
ALL_SIZE = 1000


def pulls(largest: int = 10) -> Pulls:
    made = Pulls(largest)
    made.inbox = "inbox"
    return made


def room(events: int = ALL, size: int = ALL_SIZE) -> Room:
    return Room(events, size, ALL, ALL_SIZE)


def send(these: Pulls, of: Room) -> Pull:
    pull = these.next(of)
    assert pull is not None
    these.sent(pull)
    return pull


def test_all_the_room_is_asked_for() -> None:
    """By events and by bytes."""
    assert Pull("inbox.1", 60, 700) == send(pulls(), room(60, 700))


def test_little_room_is_not_asked_for_while_a_request_is_under_way() -> None:
    """Else each event that is done would be a request of its own."""
    these = pulls()
    send(these, room(50, 500))
    assert these.next(room(24, 500)) is None
    assert these.next(room(50, 249)) is None
    assert Pull("inbox.2", 25, 250) == these.next(room(25, 250))


def test_without_a_request_any_room_is_asked_for() -> None:
    """Whoever has nothing under way must not wait for others to give room back: they may never do."""
    assert Pull("inbox.1", 1, 10) == pulls().next(room(1, 10))


def test_a_request_has_room_for_the_largest_message() -> None:
    """The broker would end it at once, again and again."""
    assert pulls(largest=10).next(room(50, 9)) is None


def test_no_request_is_larger_than_a_batch() -> None:
    """What it brings arrives in one go."""
    assert Pull("inbox.1", MAX_EVENTS, MAX_BYTES) == pulls().next(Room(10**6, 10**9, 10**6, 10**9))


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
