"""A writing process that is killed with -9 at any moment leaves whole batches (G4)."""

from __future__ import annotations

from pathlib import Path

import pytest

from fiq.corpus import EventStore
from tests.support.corpus import IDENTITY
from tests.support.torture import LONG, kill_again_and_again, kill_writer, times


@pytest.mark.timeout(3600 if LONG else 240)
def test_a_writer_killed_at_any_moment_leaves_whole_batches(tmp_path: Path) -> None:
    """After each kill the file recovers, verifies, opens in stock h5py, and holds the acknowledged batches or one more.

    A checkpoint begins every few commits and the journal turns as often, so kills hit both. In
    every fourth run a reader holds the file, and the journal is compacted instead.
    """
    killed = kill_again_and_again(tmp_path / "00.h5", times(50, 500), seed=11)
    assert killed.kills >= times(50, 500)
    assert killed.varied, killed


@pytest.mark.parametrize("beyond", [0, 30])
def test_a_writer_that_ends_by_itself_is_no_killed_one(tmp_path: Path, beyond: int) -> None:
    """An error of its own at the start or later must not pass for a kill: here the sequences come to their end."""
    with EventStore.create(tmp_path / "00.h5", IDENTITY) as store:
        store.commit(2**64 - 1 - beyond)
    with pytest.raises(AssertionError, match="ended by itself"):
        kill_writer(tmp_path / "00.h5", 100, 0.0)
