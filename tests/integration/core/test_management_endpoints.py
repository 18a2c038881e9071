"""The management endpoints: alive, ready, metrics."""

from __future__ import annotations

import asyncio
import json
import os

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import CollectorRegistry, Counter

from fiq.errors import TransientError
from services.core.management import OVERDUE_SECONDS, TICK_SECONDS, CachedCheck, Heartbeat, add_management_routes


class Check:
    """A readiness check that counts its calls."""

    def __init__(self, *reasons: str) -> None:
        self.calls = 0
        self.reasons = list(reasons)
        self.hang = False

    async def __call__(self) -> list[str]:
        self.calls += 1
        if self.hang:
            await asyncio.Event().wait()
        return self.reasons


async def get(check: Check, path: str, registry: CollectorRegistry | None = None) -> tuple[int, str, str]:
    app = web.Application()
    add_management_routes(app, registry or CollectorRegistry(), check)
    async with TestClient(TestServer(app)) as client, client.get(path) as response:
        return response.status, response.headers["Content-Type"], await response.text()


async def test_a_service_whose_loop_turns_is_alive_also_when_it_is_not_ready() -> None:
    """Liveness restarts a process; a broker that is away is no reason to."""
    status, _, body = await get(Check("no leader"), "/healthz")
    assert (status, body) == (200, '{"status": "ok"}')


async def test_readiness_says_why_not() -> None:
    """503 with every reason, 200 without one; and which process it is that answers on the port."""
    status, _, body = await get(Check("no leader", "no consumers"), "/readyz")
    expected = {"status": "not ready", "reasons": ["no leader", "no consumers"], "pid": os.getpid()}
    assert (status, json.loads(body)) == (503, expected)
    status, _, _ = await get(Check(), "/readyz")
    assert status == 200


async def test_metrics_are_the_text_format_of_prometheus() -> None:
    """With its content type, which names the version of the format."""
    registry = CollectorRegistry()
    Counter("fi_test_total", "A test.", registry=registry).inc()
    status, content_type, body = await get(Check(), "/metrics", registry)
    assert (status, content_type.startswith("text/plain; version="), "fi_test_total 1.0" in body) == (200, True, True)


def test_a_blocked_loop_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heartbeat compares its last tick with the clock."""
    now = 1000.0
    monkeypatch.setattr("services.core.management.time.monotonic", lambda: now)
    heartbeat = Heartbeat()
    now += TICK_SECONDS + OVERDUE_SECONDS
    assert pytest.approx(OVERDUE_SECONDS) == heartbeat.late_seconds


async def test_the_heartbeat_ticks() -> None:
    """A loop that turns is never late by more than a moment."""
    heartbeat = Heartbeat()
    task = asyncio.create_task(heartbeat.run())
    await asyncio.sleep(0)
    assert heartbeat.late_seconds < OVERDUE_SECONDS
    task.cancel()


async def test_many_probes_ask_once() -> None:
    """Ten load balancers must not multiply the requests to the broker."""
    check = Check("reason")
    cached = CachedCheck(check, seconds=60, timeout=1)
    answers = await asyncio.gather(*(cached() for _ in range(50)))
    assert (check.calls, answers) == (1, [["reason"]] * 50)


async def test_an_answer_expires() -> None:
    """A service that became ready must be seen as such within the time."""
    check = Check()
    cached = CachedCheck(check, seconds=0, timeout=1)
    await cached()
    await cached()
    assert check.calls == 2


async def test_silence_is_an_answer() -> None:
    """A probe must not hang because the broker does."""
    check = Check()
    check.hang = True
    assert await CachedCheck(check, seconds=1, timeout=0.01)() == ["no answer within 0.01 s"]


async def test_a_failed_check_is_a_reason() -> None:
    """The error's text goes to the operator; such texts hold no payload."""

    async def fail() -> list[str]:
        raise TransientError("no leader")

    assert await CachedCheck(fail, seconds=1, timeout=1)() == ["no leader"]
