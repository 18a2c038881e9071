"""Spans of OpenTelemetry, when its variables ask for them and its packages are installed: ``pip install fiq[tracing]``.

Without these variables nothing of OpenTelemetry is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from fiq.errors import ConfigurationError
from fiq.trace import Trace
from services.core.logs import get_logger

EXPORTER_VARIABLE = "OTEL_TRACES_EXPORTER"
DISABLED_VARIABLE = "OTEL_SDK_DISABLED"
ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
#: the one way in which spans leave the process: OTLP over HTTP
OTLP = "otlp"


class Serving(Protocol):
    """A request that is being served.

    Attributes:
        trace: of which its span is the parent.
    """

    trace: Trace

    def answered(self, status: int) -> None:
        """Note the answer's *status*."""
        ...


class Spans(Protocol):
    """Makes spans. None of them holds a payload, an error's text or the id of a consultation."""

    def serving(self, method: str, route: str | None, trace: Trace | None) -> AbstractContextManager[Serving]:
        """Return a span around the handling of a request.

        Args:
            method: of HTTP.
            route: the path's template; None when there is no such path.
            trace: that the request names.
        """
        ...

    def publishing(
        self, destination: str, trace: Trace | None, *, events: int | None = None
    ) -> AbstractContextManager[Trace]:
        """Return a span around the publishing of one event, or of a batch of *events*, and the trace for its messages.

        Args:
            destination: the stream.
            trace: of the request.
            events: of the batch; None for a single one.
        """
        ...

    def persisted(
        self, destination: str, partition: str, traces: Sequence[Trace], *, events: int, seconds: float
    ) -> None:
        """Make a span of a batch that was committed just now.

        Args:
            destination: the stream that it came from.
            partition: of the stream.
            traces: of its events; to some of them it has links.
            events: of the batch.
            seconds: that it took.
        """
        ...

    def close(self) -> None:
        """Send what there is, within a few seconds, and make no more. Idempotent."""
        ...


@contextmanager
def spans_of(service: str, env: Mapping[str, str]) -> Iterator[Spans | None]:
    """Have what makes the spans of *service*, or None when *env* does not ask for any, or nothing can make them.

    Raises ConfigurationError: *env* asks for an exporter that is not supported.
    """
    spans = _open(service) if _asked(env) else None
    try:
        yield spans
    finally:
        if spans is not None:
            spans.close()


def _open(service: str) -> Spans | None:
    try:
        from services.core.otel import exporting
    except ImportError as error:
        get_logger("tracing").warning("TRACING_OFF", reason="pip install fiq[tracing]", missing=error.name)
        return None
    return exporting(service)


def _asked(env: Mapping[str, str]) -> bool:
    exporter = env.get(EXPORTER_VARIABLE, "").strip().lower()
    if env.get(DISABLED_VARIABLE, "").strip().lower() == "true" or exporter == "none":
        return False
    if exporter not in ("", OTLP):
        raise ConfigurationError([f"{EXPORTER_VARIABLE}={exporter!r}: expected {OTLP} or none"])
    return bool(exporter) or any(env.get(name, "").strip() for name in ENDPOINT_VARIABLES)
