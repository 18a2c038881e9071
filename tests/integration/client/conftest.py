"""A running service for the client."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from services.cli.embedded.stack import Stack


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Three nodes, one ingest, two persisters, shared by the tests of a module: each has consultations of its own."""
    with Stack(tmp_path_factory.mktemp("stack"), env={"FI_STREAM_MAX_BYTES": "256MiB"}) as running:
        yield running
