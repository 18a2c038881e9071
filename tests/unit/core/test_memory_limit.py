"""The container's memory limit, as control groups show it."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.core.command import memory_limit


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("memory.max", "536870912\n", 2**29),
        ("memory.max", "max\n", None),
        ("memory/memory.limit_in_bytes", "268435456\n", 2**28),
        ("memory/memory.limit_in_bytes", "9223372036854771712\n", None),
    ],
)
def test_both_versions_of_control_groups_are_read(tmp_path: Path, file: str, text: str, expected: int | None) -> None:
    """Each has its own way to say that there is no limit."""
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert expected == memory_limit(tmp_path)


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    """Other kernels, and machines without containers."""
    assert memory_limit(tmp_path) is None
