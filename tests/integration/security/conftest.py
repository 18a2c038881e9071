"""Three nodes with TLS and users, as `fiq init` makes them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from services.cli.embedded.processes import Cluster
from tests.support.security import Secured, make_deployment


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """Shared by the tests of a module."""
    layout = make_deployment(tmp_path_factory.mktemp("deployment"))
    with Cluster(tmp_path_factory.mktemp("cluster"), security=layout.folder) as cluster:
        yield Secured(cluster, layout)
