"""Pipelined pulls: the buffer is never promised twice."""

from __future__ import annotations

from services.eventlog.jetstream.pulls import Pull, Pulls


def pulls(max_events: int = 100, max_bytes: int = 1000) -> Pulls:
    made = Pulls(max_events, max_bytes)
    made.inbox = "inbox"
    return made


def send(these: Pulls, buffered: int = 0, size: int = 0) -> Pull:
    pull = these.next(buffered, size)
    assert pull is not None
    these.sent(pull)
    return pull


def test_two_halves_are_asked_for_and_no_third() -> None:
    """The second is served while the first is worked on."""
    these = pulls()
    assert [Pull("inbox.1", 50, 500), Pull("inbox.2", 50, 500)] == [send(these), send(these)]
    assert these.next(0, 0) is None


def test_a_full_buffer_asks_for_nothing() -> None:
    """Neither by events nor by bytes."""
    assert pulls().next(51, 0) is None
    assert pulls().next(0, 501) is None
    assert pulls().next(50, 500) is not None


def test_a_message_moves_from_what_is_promised_into_the_buffer() -> None:
    """It makes no room by itself; only emptying the buffer does."""
    these = pulls()
    send(these)
    send(these)
    for _ in range(50):
        these.delivered(10)
    assert 50 == these.promised
    assert these.next(1, 10) is None
    assert Pull("inbox.3", 50, 500) == these.next(0, 0)


def test_the_end_of_a_pull_does_not_count_as_the_arrival_of_its_messages() -> None:
    """A replicated consumer says "Batch Completed" long before it sends the batch."""
    these = pulls()
    send(these)
    send(these)
    these.ended(0, 100)
    assert 100 == these.promised
    assert these.next(0, 0) is None


def test_what_a_pull_will_not_bring_may_be_asked_for_again() -> None:
    """It expired, or its share of bytes was used up."""
    these = pulls()
    send(these)
    send(these)
    these.delivered(20)
    these.ended(49, 480)
    assert 50 == these.promised
    assert Pull("inbox.3", 50, 500) == these.next(0, 0)


def test_bytes_are_free_when_nothing_is_promised() -> None:
    """The broker's sizes and ours differ a little; that must not add up over the years."""
    these = pulls(max_events=2)
    send(these)
    these.delivered(1)
    assert 0 == these.promised
    assert these.next(0, 500) is not None
