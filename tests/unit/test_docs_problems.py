"""docs/problems.md holds every problem, as the code has it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from services.ingest.problems import BY_SLUG, ProblemType, registry

DOCS = Path(__file__).parents[2] / "docs" / "problems.md"
#: a paragraph has at least this many characters
PARAGRAPH = 60


@pytest.mark.parametrize("problem", registry(), ids=lambda problem: problem.slug)
def test_each_problem_has_its_section(problem: ProblemType) -> None:
    """It begins with the status, and says what to do."""
    section = DOCS.read_text().partition(f"\n## {problem.slug}\n")[2].partition("\n## ")[0].strip()
    assert section.startswith(f"**{problem.status}** ")
    assert len(section) >= PARAGRAPH


def test_the_page_says_what_may_be_retried_by_status() -> None:
    """Which holds for every problem: see the last test."""
    assert "**Retry 409, 429 and 503 after `Retry-After`**" in DOCS.read_text()


def test_no_problem_is_documented_that_does_not_exist() -> None:
    """A type is a promise: it does not go away unnoticed either."""
    headings = re.findall(r"^## (\S+)$", DOCS.read_text(), re.MULTILINE)
    assert headings == [problem.slug for problem in registry()]


def test_slugs_are_unique_and_fit_for_a_path() -> None:
    """Two problems of one type could not be told apart."""
    assert len(BY_SLUG) == len(registry())
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", slug) for slug in BY_SLUG)


def test_what_may_succeed_later_has_a_status_that_says_so() -> None:
    """Retry-After belongs to 409, 429 and 503 here, and to all of them."""
    assert {problem.status for problem in registry() if problem.retry} == {409, 429, 503}
    assert not [problem for problem in registry() if problem.status in {409, 429, 503} and not problem.retry]
