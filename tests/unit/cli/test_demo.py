"""The comparison of `fiq demo` and the acceptance tests finds each deviation."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest

from fiq.corpus import EventStore, Identity, Record
from services.cli.demo import AcceptedPost, LoadResult, Post, compare_corpus, generate, wait_until_persisted

IDENTITY = Identity("main", "volume", 1, 0, 1, "fi-events", "2026-11-23T10:00:00Z")
KEYS = [str(UUID(int=number)) for number in range(3)]
ACCEPTED = [AcceptedPost(Post("c1", key, b'{"n":%d}' % number), number + 1) for number, key in enumerate(KEYS)]


def corpus(directory: Path, *events: tuple[str, int, bytes]) -> Path:
    """Write *events* (key, sequence, body) of consultation c1."""
    with EventStore.create(directory / "00.h5", IDENTITY) as store:
        records = [Record(sequence, 1, 2, UUID(key).bytes, body) for key, sequence, body in events]
        store.append("c1", records)
        store.commit(records[-1].sequence)
    return directory


def rows(*numbers: int) -> list[tuple[str, int, bytes]]:
    return [(KEYS[number], number + 1, b'{"n":%d}' % number) for number in numbers]


def test_what_was_accepted_and_nothing_else_is_fine(tmp_path: Path) -> None:
    """Once, byte for byte, in order."""
    verdict = compare_corpus(corpus(tmp_path, *rows(0, 1, 2)), ACCEPTED)
    assert ([], 3, 1) == (verdict.problems, verdict.persisted, verdict.consultations)


def test_an_earlier_sequence_than_the_client_was_told_is_fine(tmp_path: Path) -> None:
    """An attempt whose answer was lost may have brought the event."""
    accepted = [ACCEPTED[0], AcceptedPost(ACCEPTED[1].post, 9)]
    assert [] == compare_corpus(corpus(tmp_path, *rows(0, 1)), accepted).problems


@pytest.mark.parametrize(
    ("events", "problem"),
    [
        (rows(0, 2), "is missing"),
        ([*rows(0, 1, 2), (KEYS[0], 4, b'{"n":0}')], "is there twice"),
        ([*rows(0, 1, 2), (str(UUID(int=9)), 4, b"{}")], "was never accepted"),
        ([*rows(0, 1), (KEYS[2], 3, b'{"n":7}')], "has another body"),
        ([*rows(0, 1), (KEYS[2], 8, b'{"n":2}')], "was told 3"),
    ],
)
def test_each_deviation_is_named(tmp_path: Path, events: list[tuple[str, int, bytes]], problem: str) -> None:
    """By consultation and event, never by content."""
    problems = compare_corpus(corpus(tmp_path, *events), ACCEPTED).problems
    assert any(problem in line for line in problems)
    assert not any('"n"' in line for line in problems)


async def test_waiting_ends_when_the_corpus_holds_all_events_or_the_time_is_over(tmp_path: Path) -> None:
    """And says which of both it was, and how many there are meanwhile."""
    seen: list[int] = []
    corpus(tmp_path, *rows(0, 1, 2))
    assert await wait_until_persisted(tmp_path, 3, timeout=0, on_count=seen.append)
    assert not await wait_until_persisted(tmp_path, 4, timeout=0, on_count=seen.append)
    assert [3, 3] == seen


def test_a_missing_consultation_is_named(tmp_path: Path) -> None:
    """It has no group at all."""
    accepted = [*ACCEPTED, AcceptedPost(Post("c2", str(UUID(int=7)), b"{}"), 9)]
    assert ["c2: not in the corpus"] == compare_corpus(corpus(tmp_path, *rows(0, 1, 2)), accepted).problems


def test_the_same_seed_gives_the_same_consultations() -> None:
    """A failing run can be repeated."""
    first = generate(500, seed=3)
    assert first == generate(500, seed=3)
    assert 500 == sum(len(posts) for posts in first)
    assert first != generate(500, seed=4)


def test_percentiles_are_those_of_the_accepted_posts() -> None:
    """The nearest rank."""
    outcome = LoadResult(seconds=[0.4, 0.1, 0.3, 0.2])
    assert (0.2, 0.4) == (outcome.percentile(0.5), outcome.percentile(0.99))
