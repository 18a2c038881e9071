"""Structured logs: an event name plus keys and values, one line each, never a payload.

JSON lines on stdout, or coloured text when stdout is a terminal. See structlog's "Logging Best Practices".
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import select
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import orjson
import structlog

#: a line waits at most this long for others to be written with it, seconds
HOLD_SECONDS = 0.05
#: log lines of one kind a second in the long run, and at once
THROTTLE_RATE, THROTTLE_BURST = 5.0, 50
#: the same for a failure that repeats until it is repaired
REPEATED_RATE, REPEATED_BURST = 1 / 600, 1
#: kinds that a throttle keeps apart; of more it forgets the oldest
_MAX_KINDS = 1000

#: the levels that FI_LOG_LEVEL takes
LEVELS = ("debug", "info", "warning", "error")


def level(value: str) -> str:
    """Parse the setting FI_LOG_LEVEL."""
    if value.lower() not in LEVELS:
        raise ValueError(", ".join(LEVELS))
    return value.lower()


EVENT_QUEUED = "EVENT_QUEUED"
#: of ingest, for each batch in place of EVENT_QUEUED
BATCH_QUEUED = "BATCH_QUEUED"
EVENT_PERSISTED = "EVENT_PERSISTED"
#: of the persister, for each sampled trace of a batch, up to a limit
EVENT_TRACED = "EVENT_TRACED"
EVENT_PERSIST_FAILED = "EVENT_PERSIST_FAILED"
EVENT_WORKER_STARTED = "EVENT_WORKER_STARTED"


def configure(service: str, *, level: str = "info", json: bool | None = None) -> None:
    """Set up logging for the process.

    Args:
        service: value of the key ``service`` in each line.
        level: one of :data:`LEVELS`.
        json: write JSON lines; by default when stdout is no terminal.
    """
    as_json = not sys.stdout.isatty() if json is None else json
    threshold = getattr(logging, level.upper())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if as_json:
        processors = [
            *shared,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(orjson.dumps),
        ]
        lines = _Lines()
        factory: Any = lambda *_: lines  # noqa: E731
    else:
        processors = [
            *shared,
            structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
        ]
        factory = structlog.PrintLoggerFactory(sys.stdout)
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=factory,
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(service=service)
    logging.basicConfig(handlers=[_Forward()], level=logging.WARNING, force=True)


def get_logger(name: str) -> Any:
    """Return a logger whose lines carry *name* under the key ``component``."""
    return structlog.get_logger(component=name)


def get_audit_logger() -> Any:
    """Return the logger of the audit log: who was shown or changed what. FI_LOG_LEVEL does not silence it."""
    every = structlog.make_filtering_bound_logger(logging.INFO)
    return structlog.wrap_logger(None, wrapper_class=every, component="audit")


class LogThrottle:
    """Bounds how many log lines of each kind are written: clients and outages must not fill a disk.

    Lines that are left out are counted; the next line of their kind says how many.

    Args:
        rate: lines of a kind a second in the long run.
        burst: lines of a kind at once.
        clock: seconds, monotonic.
    """

    def __init__(
        self, rate: float | None = None, burst: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.rate = THROTTLE_RATE if rate is None else rate
        self.burst = THROTTLE_BURST if burst is None else burst
        self._clock = clock
        #: of each kind: lines that it may write at that time, and lines left out
        self._kinds: dict[str, tuple[float, float, int]] = {}

    @classmethod
    def of_repeated(cls) -> LogThrottle:
        """Make one for failures that repeat: one line each ten minutes of each reason, which is the kind."""
        return cls(REPEATED_RATE, REPEATED_BURST)

    def allow(self, kind: str) -> dict[str, int] | None:
        """Return what a line of *kind* adds to its values, ``left_out`` if any were; None to leave it out."""
        now = self._clock()
        level, at, left_out = self._kinds.get(kind, (float(self.burst), now, 0))
        level = min(self.burst, level + (now - at) * self.rate)
        if level < 1:
            self._kinds[kind] = level, now, left_out + 1
            return None
        self._kinds[kind] = level - 1, now, 0
        if len(self._kinds) > _MAX_KINDS:
            del self._kinds[next(iter(self._kinds))]
        return {"left_out": left_out} if left_out else {}

    def reset(self) -> None:
        """Forget everything: what failed works again."""
        self._kinds.clear()


class _Lines:
    """Writes lines to stdout, several at once, and drops what cannot be written.

    A full disk or a reader that went away must not turn a stored event into an error. A write for each line took up to
    a third of ingest's time, so within an event loop lines wait a moment for others; errors do not. A write is never
    longer than PIPE_BUF, so the lines of several processes do not mix.
    """

    def __init__(self) -> None:
        self._stream = sys.stdout.buffer
        self._held: list[bytes] = []
        self._size = 0
        self._timer_of: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        atexit.register(self.flush)

    def msg(self, line: bytes) -> None:
        """Write *line* soon."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # a thread, or no loop: there is no timer that would flush later
            loop = None
        with self._lock:
            if self._size + len(line) >= select.PIPE_BUF:
                self._write()
            self._held.append(line + b"\n")
            self._size += len(line) + 1
            if loop is None:
                self._write()
            elif loop is not self._timer_of:
                self._timer_of = loop
                loop.call_later(HOLD_SECONDS, self.flush)

    def now(self, line: bytes) -> None:
        """Write *line* at once, after those that wait."""
        self.msg(line)
        self.flush()

    debug = info = warning = log = msg
    error = critical = exception = now

    def flush(self) -> None:
        """Write what waits."""
        with self._lock:
            self._timer_of = None
            self._write()

    def _write(self) -> None:
        data = b"".join(self._held)
        self._held.clear()
        self._size = 0
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(data)
            self._stream.flush()


class _Forward(logging.Handler):
    """Writes what libraries log through the standard module as lines of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write *record* without its exception's text, which could quote data."""
        kind = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else None
        # after its first line asyncio puts reprs, which may hold exceptions with their texts
        message = record.getMessage().partition("\n")[0]
        values = {"message": message, "error": kind}
        get_logger(record.name).log(record.levelno, "LIBRARY", **{k: v for k, v in values.items() if v is not None})
