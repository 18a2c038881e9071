"""Ends of a process that no signal asked for, in this process: everything is released, one error says why."""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client

from fiq.corpus import EventStore
from services.core.lifecycle import Stop
from services.log.jetstream.log import reach_log
from services.log.protocol import LogIdentity
from services.log.settings import LogSettings
from services.persister import volume
from services.persister.answering import QuestionResponder
from services.persister.errors import VolumeBusyError
from services.persister.service import serve
from services.persister.settings import PersisterSettings
from services.persister.volume import Volume
from tests.support.persisters import PARTITIONS, Log, persisted


class Run:
    """One persister in this process."""

    def __init__(self, data: Path, log: LogSettings) -> None:
        self.data = data
        self.stop = Stop()
        self.client: Client | None = None
        self.work = asyncio.create_task(
            serve(PersisterSettings(data_dir=data, port=0, allow_ephemeral=True, log=log), self.stop)
        )

    def released(self) -> bool:
        """Whether every partition file may be opened by another process."""
        for partition in range(PARTITIONS):
            EventStore.open(self.data / f"{partition:02}.h5", expected=None).close()
        return not list((self.data / "workers").iterdir())


#: starts a persister and ends it with the block
Running = Callable[[], AbstractAsyncContextManager[Run]]


@pytest.fixture
def run(log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Running:
    @asynccontextmanager
    async def running() -> AsyncIterator[Run]:
        made = Run(tmp_path / "data", log.settings)

        async def reached(*arguments: object, **options: object) -> tuple[Client, LogIdentity]:
            made.client, identity = await reach_log(*arguments, **options)  # type: ignore[arg-type]
            return made.client, identity

        monkeypatch.setattr("services.log.jetstream.log.reach_log", reached)
        try:
            yield made
        finally:
            made.work.cancel()
            await asyncio.wait({made.work})

    return running


async def test_a_connection_that_is_closed_for_good_ends_it_in_order(log: Log, run: Running, tmp_path: Path) -> None:
    """The cluster refuses this client from now on; another process may do better. Exit code 1, no traceback."""
    async with run() as process:
        await persisted(tmp_path / "data", await log.publish(20))
        assert process.client is not None
        await process.client._close(Client.CLOSED)
        async with asyncio.timeout(20):
            await process.work
        assert process.stop.exit_code == 1
        assert "connection to the log was closed" in process.stop.reason
        assert process.released()


async def test_a_background_task_that_fails_ends_the_process_in_order(
    run: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise questions would never be answered again, without any error."""

    async def fail(_: QuestionResponder) -> None:
        raise LookupError("broken")

    monkeypatch.setattr(QuestionResponder, "run", fail)
    async with run() as running:
        with pytest.raises(LookupError, match="broken"):
            await asyncio.wait_for(asyncio.shield(running.work), 20)


async def test_a_process_that_keeps_the_volumes_lock_is_named(
    run: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be claimed then; the message says what to look for."""
    monkeypatch.setattr("services.persister.volume.LOCK_TIMEOUT_SECONDS", 0.1)
    Volume.open(tmp_path / "data", "main")
    with (tmp_path / "data" / "volume.lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        async with run() as process:
            with pytest.raises(VolumeBusyError, match="is it stopped or hanging"):
                async with asyncio.timeout(20):
                    await process.work


async def test_a_claim_lock_that_is_kept_for_a_while_delays_the_claims_only(
    log: Log, run: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A silent broker may keep another process in its claim for long; no process ends for that."""
    monkeypatch.setattr("services.persister.volume.LOCK_TIMEOUT_SECONDS", 0.1)
    busy = [VolumeBusyError("another process has held it"), VolumeBusyError("another process has held it")]
    claim = volume._claim

    async def late(*arguments: Any) -> volume.Assignment:
        if busy:
            raise busy.pop()
        return await claim(*arguments)

    monkeypatch.setattr(volume, "_claim", late)
    async with run():
        await persisted(tmp_path / "data", await log.publish(20))
    assert [] == busy


async def test_a_stop_is_heard_while_the_process_announces_itself(
    run: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The announcement is a conversation with the cluster, which may fall silent in it."""
    announcing = asyncio.Event()

    async def add_service(*_: object, **__: object) -> None:
        announcing.set()
        await asyncio.Event().wait()

    monkeypatch.setattr("nats.micro.add_service", add_service)
    async with run() as process:
        await announcing.wait()
        process.stop.request("the test says so")
        await asyncio.wait({process.work}, timeout=20)
        assert process.work.done()
        assert [] == list((process.data / "workers").iterdir())
