"""Words that messages share."""

from __future__ import annotations


def count(number: int, what: str) -> str:
    """Return *number* and *what* it counts, in the plural unless it is one."""
    plural = f"{what[:-1]}ies" if what.endswith("y") else f"{what}{'es' if what.endswith('s') else 's'}"
    return f"{number} {what if number == 1 else plural}"
