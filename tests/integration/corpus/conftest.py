"""Fixtures of the tests of the corpus with other processes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from fiq.corpus import EventStore
from tests.support.corpus import IDENTITY


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An empty partition file, closed."""
    path = tmp_path / "00.h5"
    EventStore.create(path, IDENTITY).close()
    return path


@pytest.fixture
def h5dump() -> str:
    """The program; where it is missing the test is skipped, but not where CI asks for every tool."""
    program = shutil.which("h5dump")
    if program is None:
        message = "h5dump is not installed (package hdf5-tools)"
        if os.environ.get("FIQ_CI_REQUIRE_TOOLS") or os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return program
