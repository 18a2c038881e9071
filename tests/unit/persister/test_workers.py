"""The live processes of a volume."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from services.persister.placement import Workers, owners
from tests.support.polling import eventually_sync

_JOIN_AND_WAIT = """
import sys, time
from pathlib import Path

import pytest
from services.persister.placement import Workers
Workers(Path(sys.argv[1]), sys.argv[2]).join()
print("joined", flush=True)
time.sleep(60)
"""


def test_members_see_each_other_until_they_leave(tmp_path: Path) -> None:
    """Each holds a lock on a file of its own."""
    first, second = Workers(tmp_path / "workers", "a"), Workers(tmp_path / "workers", "b")
    first.join()
    second.join()
    assert ["a", "b"] == first.alive() == second.alive()
    second.leave()
    assert first.alive() == ["a"]
    first.leave()


def test_a_killed_process_is_no_member_any_more_and_its_file_goes(tmp_path: Path) -> None:
    """The kernel lets the lock go with the process."""
    workers = tmp_path / "workers"
    us = Workers(workers, "us")
    us.join()
    with subprocess.Popen([sys.executable, "-c", _JOIN_AND_WAIT, str(workers), "it"], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert us.alive() == ["it", "us"]
        other.kill()
        other.wait()
    eventually_sync(lambda: us.alive() == ["us"])
    assert [path.name for path in workers.iterdir()] == ["us.lock"]
    us.leave()


def test_a_member_that_has_not_joined_sees_the_others_and_itself(tmp_path: Path) -> None:
    """A process never takes itself for dead."""
    (tmp_path / "workers").mkdir()
    assert Workers(tmp_path / "workers", "a").alive() == ["a"]


@pytest.mark.parametrize(
    ("members", "sizes"), [("a", [16]), ("ab", [8, 8]), ("abc", [4, 6, 6]), ("abcde", [0, 4, 4, 4, 4])]
)
def test_the_shares_are_equal(members: str, sizes: list[int]) -> None:
    """No member gets more than its part, rounded up."""
    shares = Counter(owners(range(16), members).values())
    assert max(sizes) == max(shares.values())
    assert shares.total() == 16


def test_all_members_agree_whatever_the_order_in_which_they_see_each_other() -> None:
    """They do not talk; a partition has one owner."""
    assert owners([3, 1, 2], ["a", "b"]) == owners([1, 2, 3], ["b", "a"])


def test_a_members_end_moves_little_more_than_its_own_partitions() -> None:
    """The others keep most of what they have: their files stay open."""
    before = owners(range(96), ["a", "b", "c"])
    after = owners(range(96), ["a", "c"])
    moved = {p for p in before if before[p] != after[p]}
    assert {p for p in before if before[p] == "b"} <= moved
    assert len(moved) < 48
