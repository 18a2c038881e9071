"""What a follower holds: in order, and counted until it is done."""

from __future__ import annotations

from services.eventlog.jetstream.buffer import Buffer
from services.eventlog.protocol import Delivery


def delivery(sequence: int, size: int = 10) -> Delivery:
    return Delivery(sequence, "c1", None, b"x" * size, f"token-{sequence}")


def filled(*sizes: int) -> Buffer:
    buffer = Buffer()
    for sequence, size in enumerate(sizes, 1):
        buffer.put(delivery(sequence, size))
    return buffer


def test_a_batch_has_what_fits_in_order() -> None:
    """By number and by bytes."""
    buffer = filled(10, 10, 10, 10)
    assert [1, 2] == [taken.sequence for taken in buffer.take(2, 1000)]
    assert [3] == [taken.sequence for taken in buffer.take(2, 15)]
    assert 1 == len(buffer)


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
