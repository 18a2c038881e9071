"""Unit tests open no sockets and start no processes."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.support.isolation import isolated


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, object, object]:
    """Refuse sockets and processes to the fixtures of a test."""
    with isolated():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Refuse sockets and processes to a test."""
    with isolated():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Generator[None, object, object]:
    """Refuse sockets and processes to the clean-up of fixtures."""
    with isolated():
        return (yield)
