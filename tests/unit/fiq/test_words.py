"""Words that messages share."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fiq
import services
from fiq.words import count

SOURCES = [path for package in (fiq, services) for path in Path(package.__path__[0]).rglob("*.py")]
#: a number in braces, and what it counts in the plural: "1 messages" would be shown
_PLURAL = re.compile(
    r"\{(?:len\([^{}]*\)|[^{}()]*(?:count|number|messages|events|copies|persisted))\} "
    r"(?:events|messages|lines|files|copies|partitions|nodes|services|problems|consultations|replicas|tokens)\b"
)


@pytest.mark.parametrize(
    ("number", "what", "expected"),
    [
        (0, "event", "0 events"),
        (1, "event", "1 event"),
        (2, "partition file", "2 partition files"),
        (1, "copy", "1 copy"),
        (3, "copy", "3 copies"),
        (2, "process", "2 processes"),
    ],
)
def test_what_is_counted_is_in_the_singular_only_for_one(number: int, what: str, expected: str) -> None:
    """Zero is many."""
    assert expected == count(number, what)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: "/".join(path.parts[-3:]))
def test_no_message_has_a_fixed_plural_after_a_number(path: Path) -> None:
    """Use count()."""
    assert [] == _PLURAL.findall(path.read_text())
