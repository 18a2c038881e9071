"""Bounds that follow the container's memory."""

from __future__ import annotations

import pytest

from services.core.settings import load
from services.persister.settings import BASE_BYTES, PersisterSettings, bounds, fit_memory, needed_bytes

DEFAULTS = PersisterSettings()


@pytest.mark.parametrize("limit", [None, 2**40, needed_bytes(DEFAULTS)])
def test_with_enough_memory_nothing_changes(limit: int | None) -> None:
    """What was set stays."""
    assert DEFAULTS == fit_memory(DEFAULTS, limit)


def test_a_small_limit_makes_all_bounds_smaller_so_that_they_fit() -> None:
    """By the same factor: none is given up for another."""
    limit = 256 * 2**20
    bounded = fit_memory(DEFAULTS, limit)
    assert limit - 2**20 < needed_bytes(bounded) <= limit
    shares = {bounded.buffer_bytes / DEFAULTS.buffer_bytes, bounded.known_ids / DEFAULTS.known_ids}
    assert max(shares) - min(shares) < 0.001


@pytest.mark.parametrize("limit", [1, BASE_BYTES])
def test_what_progress_needs_is_left(limit: int) -> None:
    """A limit that no process can keep is no reason to stand still."""
    bounded = fit_memory(DEFAULTS, limit)
    assert (2**21, 2**20, 64, 100_000) == (
        bounded.buffer_bytes,
        bounded.batch_bytes,
        bounded.open_consultations,
        bounded.known_ids,
    )


def test_a_bound_that_is_smaller_already_is_never_raised() -> None:
    """The least values are for what is made smaller here."""
    small = load(PersisterSettings, {"FI_KNOWN_IDS": "1000", "FI_BATCH_BYTES": "64KiB"})
    bounded = fit_memory(small, BASE_BYTES)
    assert (1000, 2**16) == (bounded.known_ids, bounded.batch_bytes)


def test_workers_get_the_bounds_of_their_parent() -> None:
    """It divides the memory; each of them sees the container's whole limit only."""
    bounded = fit_memory(DEFAULTS, 200 * 2**20)
    assert bounded == load(PersisterSettings, bounds(bounded))
