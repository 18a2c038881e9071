"""The containers' health check."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from prometheus_client import CollectorRegistry

from services.core.management import add_management_routes
from services.core.probe import ask, main
from tests.support.polling import eventually


@pytest.fixture
async def server() -> AsyncIterator[TestServer]:
    """A service's management endpoints, alive and not ready."""

    async def ready() -> list[str]:
        return ["no quorum"]

    app = web.Application()
    add_management_routes(app, CollectorRegistry(), ready)
    server = TestServer(app, host="127.0.0.1")
    async with server:
        yield server


async def _code(*urls: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "services.core.probe", *urls]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


async def test_200_is_healthy_and_503_is_not(server: TestServer) -> None:
    """What the service answered is in the output, which `docker inspect` shows."""
    base = f"http://127.0.0.1:{server.port}"
    assert (0, "") == await _code(f"{base}/healthz")
    code, said = await _code(f"{base}/readyz")
    assert 1 == code
    assert "503" in said
    assert "no quorum" in said


async def test_one_of_several_is_enough(server: TestServer) -> None:
    """The image's own check does not know which service runs."""
    code, _ = await _code("http://127.0.0.1:1/healthz", f"http://127.0.0.1:{server.port}/healthz")
    assert 0 == code


def test_a_closed_port_and_a_missing_argument_are_unhealthy(capsys: pytest.CaptureFixture[str]) -> None:
    """One line says why."""
    assert 1 == main(["http://127.0.0.1:1/healthz"])
    assert "refused" in capsys.readouterr().err
    assert 1 == main([])
    assert "usage" in capsys.readouterr().err


async def test_silence_is_an_answer() -> None:
    """A process that hangs accepts and says nothing."""
    connected: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(lambda _, writer: connected.append(writer), "127.0.0.1", 0)
    async with silent:
        port = silent.sockets[0].getsockname()[1]
        assert "timed out" in await asyncio.to_thread(ask, f"http://127.0.0.1:{port}/healthz", 0.2)
        await eventually(lambda: len(connected) == 1)
        connected[0].close()
