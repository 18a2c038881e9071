"""A writing process that is killed with -9 at any moment leaves whole batches (G4)."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.corpus import verify_corpus
from tests.support import torture
from tests.support.torture import LONG, check_recovered, kill_again_and_again, times


@pytest.mark.timeout(3600 if LONG else 120)
def test_a_writer_killed_at_any_moment_leaves_whole_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each kill the file recovers, opens with stock h5py, and holds the acknowledged batches, or one more.

    A verification then finds nothing: every row, body and chain is right.

    A checkpoint begins every few commits and the journal turns as often, so kills hit both. In
    every fourth run a reader holds the file, and the journal is compacted instead.
    """
    verified = 0

    def check_and_verify(path: Path, acknowledged: int) -> int:
        nonlocal verified
        recovered = check_recovered(path, acknowledged)
        report = verify_corpus(path)
        assert (report.problems, report.events) == ((), recovered)
        verified += 1
        return recovered

    monkeypatch.setattr(torture, "check_recovered", check_and_verify)
    killed = kill_again_and_again(tmp_path / "00.h5", times(50, 500), seed=11)
    assert verified == killed.kills == times(50, 500)
    assert min(killed.in_checkpoints, killed.with_records, killed.turned) > killed.kills // 25
    assert killed.compacted > 0
