"""The first steps of a service: FI_STARTUP_TIMEOUT bounds all of them, and a signal ends each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import nats
import pytest
from nats.aio.msg import Msg

from services.log.errors import ProvisionError, StartupError
from services.log.jetstream.connection import Role
from services.log.jetstream.log import reach, reach_log
from services.log.settings import LogSettings
from tests.support.broker import plain_server, taken
from tests.support.polling import eventually
from tests.support.service import Service

#: far more than the time given, far less than the half minute that one round of provisioning may take, seconds
SOON = 15.0


@dataclass
class Silent:
    """A server that says nothing when JetStream is asked: a cluster without a leader looks like this."""

    url: str
    asked: list[str] = field(default_factory=list)

    def settings(self, *, provision: bool) -> LogSettings:
        return LogSettings(servers=(self.url,), startup_timeout=1.0, provision=provision)


@asynccontextmanager
async def silence(folder: Path) -> AsyncIterator[Silent]:
    with plain_server(folder) as url:
        silent = Silent(url)

        async def listen(message: Msg) -> None:
            silent.asked.append(message.subject)

        connection = await nats.connect(url)
        await connection.subscribe("$JS.API.>", cb=listen)
        await taken(connection)
        try:
            yield silent
        finally:
            await connection.close()


@pytest.mark.parametrize("provision", [True, False])
async def test_a_silent_cluster_is_given_up_after_the_startup_timeout(tmp_path: Path, provision: bool) -> None:
    """Provisioning, and looking for the stream, get what is left of the time, not a time of their own."""
    async with silence(tmp_path) as silent:
        started = time.monotonic()
        with pytest.raises(StartupError, match=r"gave up after 1 s \(FI_STARTUP_TIMEOUT\)"):
            await reach_log(
                silent.settings(provision=provision), name="test", role=Role.PERSISTER, on_closed=lambda _: None
            )
        assert SOON > time.monotonic() - started
        assert silent.asked


async def test_who_needs_no_stream_is_content_with_a_connection(tmp_path: Path) -> None:
    """Where provisioning is off, ingest starts before the stream exists; its readiness says what is missing."""
    async with silence(tmp_path) as silent:
        client = await reach(silent.settings(provision=False), name="test", role=Role.INGEST, on_closed=lambda _: None)
        assert client.is_connected
        assert [] == silent.asked
        await client.close()


@pytest.mark.parametrize("provision", [True, False])
async def test_a_server_without_jetstream_is_named_at_once(tmp_path: Path, provision: bool) -> None:
    """Waiting would not help."""
    with plain_server(tmp_path) as url, pytest.raises(ProvisionError, match="JetStream is not enabled"):
        await reach_log(
            LogSettings(servers=(url,), provision=provision), name="test", role=Role.PERSISTER, on_closed=pytest.fail
        )


async def test_a_signal_ends_a_persister_that_looks_for_its_stream(tmp_path: Path) -> None:
    """At once, although the cluster says nothing; exit code 0, as it was asked to end."""
    async with silence(tmp_path) as silent:
        settings = {"FI_LOG_URL": silent.url, "FI_PROVISION": "false", "FI_PERSISTER_PORT": "0"}
        with Service(tmp_path, "services.persister", FI_DATA_DIR=str(tmp_path / "data"), **settings) as persister:
            await eventually(lambda: bool(silent.asked))
            persister.terminate()
            assert 0 == await asyncio.to_thread(persister.process.wait, SOON)
            assert "" == persister.errors
