"""Fixtures of the corpus's tests."""

from __future__ import annotations

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
