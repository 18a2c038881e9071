"""Bounds that follow the container's memory."""

from __future__ import annotations

from services.ingest.service import BASE_BYTES, COPIES, fit_memory
from services.ingest.settings import Settings

DEFAULTS = Settings()


def test_without_a_limit_and_with_a_large_one_nothing_changes() -> None:
    """What was set stays."""
    assert DEFAULTS == fit_memory(DEFAULTS, None)
    assert DEFAULTS == fit_memory(DEFAULTS, 2**40)


def test_bodies_in_flight_fit_into_what_is_left() -> None:
    """With each of their copies."""
    assert 2**25 == fit_memory(DEFAULTS, BASE_BYTES + COPIES * 2**25).max_in_flight_bytes


def test_one_event_of_the_largest_size_is_always_taken() -> None:
    """However small the limit is."""
    assert DEFAULTS.max_event_bytes == fit_memory(DEFAULTS, 1).max_in_flight_bytes
