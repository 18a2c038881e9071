"""Stock h5py sees a busy writer's checkpoint, or reports that the file is locked; never a torn state (G4)."""

from __future__ import annotations

from pathlib import Path

import pytest

from fiq.corpus import EventStore, verify_corpus
from tests.support.corpus import IDENTITY, expected, stock_contents
from tests.support.torture import CONSULTATIONS, LONG, SMALL_BATCH, busy_writer, times

#: what HDF5 says when another program holds the lock, or held it between HDF5's look at the size and its own lock
_LOCKED = ("unable to lock file", "truncated file")


@pytest.mark.timeout(3600 if LONG else 240)
def test_stock_h5py_beside_a_busy_writer_sees_a_checkpoint_or_is_told_of_the_lock(tmp_path: Path) -> None:
    """Each time: exactly the events of a commit, never fewer than before; or the refusal that says "try again".

    It goes on until the file was open often enough, several checkpoints were seen, and the lock was met.
    """
    path = tmp_path / "00.h5"
    EventStore.create(path, IDENTITY).close()
    seen: list[int] = []
    locked = 0
    with busy_writer(path):
        for number in range(times(50_000, 500_000)):
            committed = _read(path)
            if committed is None:
                locked += 1
            else:
                seen.append(committed)
            if number >= times(200, 2_000) and len(seen) > 50 and len(set(seen)) > 10 and locked > 0:
                break
    assert len(seen) > 50
    assert len(set(seen)) > 10
    assert locked > 0
    assert sorted(seen) == seen
    report = verify_corpus(path)
    assert () == report.problems
    assert report.events >= seen[-1]


def _read(path: Path) -> int | None:
    """Read all of the file, which must be a whole commit, and return its sequence; None when it is locked."""
    try:
        committed, contents = stock_contents(path)
    except OSError as error:
        if not any(refusal in str(error) for refusal in _LOCKED):
            raise
        return None
    assert committed % SMALL_BATCH == 0
    assert expected(committed, CONSULTATIONS) == contents
    return committed
