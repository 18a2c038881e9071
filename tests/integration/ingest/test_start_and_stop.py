"""From start to end, in the test's own process."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest

from fiq.errors import PermanentError
from services.cli import monitoring
from services.cli.embedded.processes import free_ports
from services.core.lifecycle import Stop
from services.ingest import service
from services.ingest.admission import BacklogLimiter
from services.ingest.service import serve
from services.ingest.settings import Settings
from services.log.metrics import LogMetrics
from services.log.protocol import IngestLog
from tests.support.ingest import MemoryLog
from tests.support.polling import eventually

SETTINGS = Settings(port=0, management_port=0)


@pytest.fixture(autouse=True)
def unfrozen() -> Iterator[None]:
    """A service freezes what it has made; the tests go on."""
    yield
    gc.unfreeze()


async def test_a_connection_that_is_lost_for_good_ends_the_process_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor starts the process again; what was opened is closed."""
    log = MemoryLog()

    @asynccontextmanager
    async def opener(_: Settings, on_closed: Callable[[str], None], metrics: LogMetrics) -> AsyncIterator[IngestLog]:
        async with log.open(metrics) as opened:
            asyncio.get_running_loop().call_later(0.05, on_closed, "gone")
            yield opened

    monkeypatch.setattr(service, "open_log", opener)
    stop = Stop()
    await asyncio.wait_for(serve(SETTINGS, stop, version="test"), 10)
    assert (stop.exit_code, stop.reason, log.closed) == (1, "gone", True)


async def test_a_part_that_fails_beside_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would go on for days without what it does: without a limit to the backlog, say."""
    log = MemoryLog()

    def update(_: BacklogLimiter) -> None:
        raise LookupError("broken")

    monkeypatch.setattr(service, "open_log", lambda _, __, metrics: log.open(metrics))
    monkeypatch.setattr(BacklogLimiter, "update", update)
    with pytest.raises(LookupError, match="broken"):
        await asyncio.wait_for(serve(SETTINGS, Stop(), version="test"), 10)
    assert log.closed


async def test_an_error_at_start_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program makes one line of it."""

    def opener(_: Settings, __: Callable[[str], None], ___: LogMetrics) -> None:
        raise PermanentError("no permission")

    monkeypatch.setattr(service, "open_log", opener)
    with pytest.raises(PermanentError, match="no permission"):
        await asyncio.wait_for(serve(SETTINGS, Stop(), version="test"), 10)


async def test_probes_are_answered_while_the_cluster_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Alive, not ready, and why; clients are refused until events can be taken."""

    @asynccontextmanager
    async def opener(_: Settings, __: Callable[[str], None], ___: LogMetrics) -> AsyncIterator[IngestLog]:
        await asyncio.Event().wait()
        yield MemoryLog().opened

    monkeypatch.setattr(service, "open_log", opener)
    port, management = free_ports(2)
    stop = Stop()
    serving = asyncio.create_task(serve(Settings(port=port, management_port=management), stop, version="test"))

    async def answer(of: int, path: str) -> tuple[int, bytes]:
        return await asyncio.to_thread(monitoring.get, of, path)

    async def alive() -> bool:
        return (await answer(management, "/healthz"))[0] == 200

    await eventually(alive)
    status, body = await answer(management, "/readyz")
    assert (503, True) == (status, b"the service is starting" in body)
    assert (0, b"") == await answer(port, "/problems/not-found")
    stop.request("SIGTERM")
    await asyncio.wait_for(serving, 10)


async def test_a_stop_while_it_starts_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the cluster lets it wait."""

    @asynccontextmanager
    async def opener(_: Settings, __: Callable[[str], None], ___: LogMetrics) -> AsyncIterator[IngestLog]:
        await asyncio.Event().wait()
        yield MemoryLog().opened

    monkeypatch.setattr(service, "open_log", opener)
    stop = Stop()
    asyncio.get_running_loop().call_later(0.05, stop.request, "SIGTERM")
    await asyncio.wait_for(serve(SETTINGS, stop, version="test"), 10)
    assert stop.exit_code == 0
