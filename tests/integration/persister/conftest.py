"""The log that the tests of this folder use."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from services.cli.embedded.processes import Cluster
from tests.support.persisters import Log, provisioned


@pytest.fixture
async def log(fresh_log: Cluster) -> AsyncIterator[Log]:
    """Three nodes with fresh streams."""
    async with provisioned(fresh_log) as made:
        yield made
