"""Acceptance: the whole pipeline as real processes, hurt on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.cli.embedded.stack import Stack


@pytest.fixture
def start_stack(tmp_path: Path) -> Iterator[Callable[..., Stack]]:
    """Start a stack of three nodes, one ingest and two persisters with the given settings; stopped at the end."""
    started: list[Stack] = []

    def start(**env: str) -> Stack:
        stack = Stack(tmp_path / f"stack-{len(started)}", env={"FI_STREAM_MAX_BYTES": "256MiB"} | env)
        started.append(stack)
        stack.start()
        return stack

    yield start
    for stack in started:
        stack.stop()
