"""The sorted names of a partition."""

from __future__ import annotations

from services.persister.partition import ConsultationIndex


def complete(*names: str) -> ConsultationIndex:
    made = ConsultationIndex()
    made.load(names)
    made.load([])
    return made


def test_names_are_sorted_whatever_slices_they_come_in() -> None:
    """Some twice, when one was created in between."""
    names = ConsultationIndex()
    names.load(["b", "d"])
    names.add(["a"])
    names.load(["a", "b"])
    assert 4 == names.position
    assert not names.complete
    names.load([])
    names.add(["c"])
    assert ["a", "b", "c", "d"] == names.select("", "", 10)


def test_a_page_begins_after_the_last_one_and_ends_with_the_prefix() -> None:
    """At the later of prefix and position."""
    names = complete("a", "b", "b-1", "b-2", "b1", "c")
    assert ["b", "b-1"] == names.select("b", "", 2)
    assert ["b-2", "b1"] == names.select("b", "b-1", 5)
    assert ["b", "b-1", "b-2", "b1"] == names.select("b", "a", 5)
    assert [] == names.select("b", "c", 5)
    assert [] == names.select("x", "", 5)
    assert [] == names.select("", "", 0)
    assert ["c"] == names.select("", "b1", 5)
