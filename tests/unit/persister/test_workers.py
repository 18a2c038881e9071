"""The live processes of a volume."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from services.persister.volume import Workers, owners


def test_members_see_each_other_until_they_leave(tmp_path: Path) -> None:
    """Each holds a lock on a file of its own."""
    first, second = Workers(tmp_path / "workers", "a"), Workers(tmp_path / "workers", "b")
    first.join()
    second.join()
    assert ["a", "b"] == first.alive() == second.alive()
    second.leave()
    assert first.alive() == ["a"]
    first.leave()


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
