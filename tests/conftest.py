"""Fixtures of all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

from services.cli.embedded import stack
from services.cli.embedded.processes import Cluster, free_ports

pytest.register_assert_rewrite("tests.support")  # a failing assert in there says what it compared

from tests.support.cluster import delete_streams, heal  # noqa: E402

# the same examples in every run of `make test`; `make torture` draws new ones
settings.register_profile("repeatable", derandomize=True)
if os.environ.get("FIQ_TORTURE") != "long":
    settings.load_profile("repeatable")

# a shell that starts the tests in the background makes them and the processes that they start ignore SIGINT
signal.signal(signal.SIGINT, signal.default_int_handler)

# the tests, and the processes that they start, ignore the settings of the machine
for _name in [name for name in os.environ if name.startswith("FI_")]:
    del os.environ[_name]

# where the machine forbids it, each of the many processes would compile the product's modules again
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# folders of tests may be in memory, or in a container's overlay
os.environ["FI_ALLOW_EPHEMERAL"] = "1"

# no test needs public certificate authorities, and reading their certificates costs each process 0.1 s at its start
os.environ["SSL_CERT_FILE"] = os.devnull

# numpy starts a thread of linear algebra for each core, which no test uses
os.environ["OPENBLAS_NUM_THREADS"] = "1"

# keep the stacks of this process away from the default port, which a developer's `fiq up` may want
stack.PREFERRED_PORT = free_ports(1)[0]


#: in the order in which workers take them: containers, which mostly wait and take longest; unit tests, which are light,
#: at the same time; then what takes long, so that no worker is left with it at the end
_FIRST = (
    "tests/compose/",
    "tests/unit/",
    "tests/acceptance/",
    "tests/integration/persister/test_volumes.py",
    "tests/integration/cli/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long tests first; those of three hosts when the image is built, on another worker than the shared stack."""

    def turn(item: pytest.Item) -> list[bool]:
        file = item.location[0]
        if file == "tests/compose/test_hosts.py":
            file = "tests/acceptance/"
        return [not file.startswith(place) for place in _FIRST]

    items.sort(key=turn)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes, shared by the tests of a module. Ask for `fresh_log` too where streams are used."""
    with Cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture(scope="module")
def single_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One node, for tests to which the number makes no difference; streams need FI_REPLICAS=1."""
    with Cluster(tmp_path_factory.mktemp("node"), nodes=1) as running:
        yield running


@pytest.fixture
async def fresh_log(cluster: Cluster) -> Cluster:
    """Three healthy nodes without the product's streams, whatever the last test did to them."""
    await heal(cluster)
    await delete_streams(cluster)
    return cluster
