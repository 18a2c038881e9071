"""What a process remembers of the keys that it saw."""

from __future__ import annotations

from services.contract.event import Event
from services.contract.ids import event_id_from_key
from services.ingest.remembered import Known, Remembered, name_of


def _name(key: str, consultation: str = "c-1") -> bytes:
    return name_of(Event(consultation, event_id_from_key(key), 1, b"{}"))


def test_the_key_that_was_unused_for_longest_is_forgotten_first() -> None:
    """The memory is bounded, and a use counts."""
    remembered = Remembered(most=2)
    known = Known(1, 1, b"d")
    for key in ("a", "b"):
        remembered.put(_name(key), known)

    assert remembered.get(_name("a")) == known
    remembered.put(_name("c"), known)

    assert [remembered.get(_name(key)) for key in ("a", "b", "c")] == [known, None, known]
    assert len(remembered) == 2


def test_a_key_belongs_to_its_consultation() -> None:
    """As everywhere."""
    remembered = Remembered()
    remembered.put(_name("a"), Known(1, 1, b"d"))

    assert remembered.get(_name("a", "c-2")) is None
