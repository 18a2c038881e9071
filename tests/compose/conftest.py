"""Tests of the deployment: the product's image and its compose files on a real Docker engine.

One stack serves all tests of a session. Without Docker they are skipped with the reason; FIQ_REQUIRE_DOCKER=1, which CI
sets where there is an engine, turns that into a failure.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.compose.engine import build, clean_up_after_the_dead, missing, missing_image
from tests.support.compose.stack import IMAGE, Deployment, public_images


@pytest.fixture(scope="session")
def engine() -> None:
    """A Docker engine with Compose v2, without anything that killed tests left."""
    reason = missing()
    if reason is not None:
        _unable(reason)
    clean_up_after_the_dead()


@pytest.fixture(scope="session")
def image(engine: None) -> str:
    """The product's image, built from this checkout."""
    reason = missing_image(public_images())
    if reason is not None:
        _unable(reason)
    build(IMAGE)
    return IMAGE


@pytest.fixture
def stack(shared_stack: Deployment) -> Deployment:
    """The whole of compose.yaml with TLS, permissions and the balancer, healthy, whatever the last test did to it."""
    try:
        # one that missed its checks on a busy machine is healthy again a moment later; `up` would give up at once
        shared_stack.is_healthy(timeout=30)
    except AssertionError:
        shared_stack.up()
    return shared_stack


@pytest.fixture(scope="session")
def shared_stack(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """One stack for all tests of a session."""
    deployment = Deployment(tmp_path_factory.mktemp("deployment"), "stack")
    try:
        deployment.prepare()
        deployment.up()
        yield deployment
    finally:
        deployment.remove()


def _unable(reason: str) -> None:
    if os.environ.get("FIQ_REQUIRE_DOCKER") == "1":
        pytest.fail(f"FIQ_REQUIRE_DOCKER=1, but {reason}")
    pytest.skip(f"no containers here: {reason}")
