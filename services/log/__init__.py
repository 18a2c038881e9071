"""The log between ingest and the persisters.

The seam is :mod:`services.log.protocol`; each log has a folder: ``jetstream`` and ``zeromq``. :func:`open_log` opens
the one that FI_LOG_URL names, and only then imports it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, overload

from services.log.protocol import IngestLog, IngestRole, PersisterLog, PersisterRole
from services.log.settings import LogSettings

if TYPE_CHECKING:
    from services.log.metrics import LogMetrics

__all__ = ["IngestLog", "IngestRole", "PersisterLog", "PersisterRole", "open_log"]


@overload
def open_log(
    settings: LogSettings, role: IngestRole, *, metrics: LogMetrics, on_closed: Callable[[str], None]
) -> AbstractAsyncContextManager[IngestLog]: ...


@overload
def open_log(
    settings: LogSettings, role: PersisterRole, *, metrics: LogMetrics, on_closed: Callable[[str], None]
) -> AbstractAsyncContextManager[PersisterLog]: ...


def open_log(
    settings: LogSettings,
    role: IngestRole | PersisterRole,
    *,
    metrics: LogMetrics,
    on_closed: Callable[[str], None],
) -> AbstractAsyncContextManager[Any]:
    """Reach the log, make sure that it is what *settings* ask for, and watch it until the context ends.

    The context may be entered in one task and left in another one. Writers are closed first, the connection last.

    Args:
        settings: name the log by the scheme of FI_LOG_URL.
        role: what the process does.
        metrics: shows the log while it is open.
        on_closed: called with the reason when the log is lost for good: the process should stop. A connection that is
            made again by itself is not lost.

    Raises StartupError: no log within FI_STARTUP_TIMEOUT; LogAccessError: it refuses this process; ProvisionError: it
    is not what the settings ask for; ConfigurationError: a file of the settings cannot be used, or the log cannot carry
    events of FI_MAX_EVENT_BYTES.
    """
    if settings.uses_zeromq:
        from services.log.zeromq import log as zeromq

        if isinstance(role, IngestRole):
            return zeromq.open_for_ingest(settings, role, metrics=metrics, on_closed=on_closed)
        return zeromq.open_for_persister(settings, role, metrics=metrics, on_closed=on_closed)
    from services.log.jetstream import log as jetstream

    if isinstance(role, IngestRole):
        return jetstream.open_for_ingest(settings, role, metrics=metrics, on_closed=on_closed)
    return jetstream.open_for_persister(settings, role, metrics=metrics, on_closed=on_closed)
