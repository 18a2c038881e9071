"""Open the log at start: wait for the cluster, check it, and close it again in the end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from services.eventlog.jetstream.connection import check_max_payload, close
from services.eventlog.jetstream.monitor import monitoring
from services.eventlog.jetstream.names import Role
from services.eventlog.jetstream.publisher import Publisher
from services.eventlog.jetstream.reading import JetStreamReader
from services.eventlog.jetstream.startup import reach
from services.eventlog.metrics import LogMetrics
from services.ingest.app import OpenLog
from services.ingest.settings import Settings

#: shown in the servers' monitoring
CONNECTION_NAME = "fi-ingest"


@asynccontextmanager
async def open_log(settings: Settings, on_closed: Callable[[str], None], metrics: LogMetrics) -> AsyncIterator[OpenLog]:
    """Connect, provision, and yield the log; close publisher and connection afterwards.

    Args:
        settings: of the process.
        on_closed: called with the reason when the connection is lost for good.
        metrics: where the log is shown while it is open.

    Raises:
        StartupError: no cluster within FI_STARTUP_TIMEOUT.
        ConfigurationError: the broker takes no message as large as FI_MAX_EVENT_BYTES.
        ProvisionError: the stream is not what the settings ask for.
    """
    client = await reach(settings.log, name=CONNECTION_NAME, role=Role.INGEST, on_closed=on_closed)
    try:
        check_max_payload(client, settings.max_event_bytes)
        reader = JetStreamReader(client, settings.log)
        publisher = Publisher(
            client, deadline=settings.publish_deadline, max_in_flight=settings.max_in_flight, known=reader.known
        )
        await publisher.start()
        try:
            async with monitoring(client, settings.log, metrics) as monitor:
                yield OpenLog(publisher, monitor.ready, reader, monitor.backlog)
        finally:
            await publisher.close()
    finally:
        await close(client)
