"""When there are spans, and that nothing of OpenTelemetry is loaded otherwise."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from structlog.testing import capture_logs

from fiq.errors import ConfigurationError
from services.core import tracing
from services.core.tracing import Spans, open_spans

ENDPOINT = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "x"}, False),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": ENDPOINT}, False),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": ENDPOINT}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ENDPOINT}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": ENDPOINT}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_TRACES_EXPORTER": "OTLP", "OTEL_SDK_DISABLED": "false"}, True),
    ],
)
def test_the_standard_variables_ask_for_spans(env: dict[str, str], expected: bool) -> None:
    """Those that every service with OpenTelemetry knows."""
    with open_spans("fiq-test", env) as spans:
        assert expected == (spans is not None)


def test_an_exporter_that_there_is_not_is_a_wrong_setting() -> None:
    """Silence would look like a service that gets no requests."""
    with pytest.raises(ConfigurationError, match="OTEL_TRACES_EXPORTER='zipkin': expected otlp or none"):
        open_spans("fiq-test", {"OTEL_TRACES_EXPORTER": "zipkin"}).__enter__()


def test_without_the_packages_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the service runs without spans: they are no reason to take no events."""
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with capture_logs() as entries, open_spans("fiq-test", {"OTEL_TRACES_EXPORTER": "otlp"}) as spans:
        assert spans is None
    assert [("TRACING_OFF", "pip install fiq[tracing]")] == [(entry["event"], entry["reason"]) for entry in entries]


def test_unless_asked_for_nothing_of_it_is_imported() -> None:
    """Neither by the modules of both services nor when they look whether spans are wanted."""
    code = (
        "import sys\nimport services.ingest.service, services.persister.service\n"
        "from services.core.tracing import open_spans\n"
        "with open_spans('x', {}) as spans: assert spans is None\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "[]" == done.stdout.strip()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "fiq-test"),
        ({"OTEL_SERVICE_NAME": "mine"}, "mine"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=ours,a=b"}, "ours"),
    ],
)
def test_a_service_has_its_program_s_name_unless_it_is_given_another(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    """By the variables that OpenTelemetry has for it."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with open_spans("fiq-test", {"OTEL_TRACES_EXPORTER": "otlp"}) as spans:
        assert spans is not None
        assert expected == spans._provider.resource.attributes["service.name"]


class Stuck(SpanExporter):
    """A collector that never answers."""

    def __init__(self) -> None:
        self.free = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.free.wait()
        return SpanExportResult.SUCCESS


def test_a_collector_that_does_not_answer_delays_no_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """After SIGTERM the process ends in time with any collector."""
    monkeypatch.setattr(tracing, "CLOSE_SECONDS", 0.1)
    exporter = Stuck()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    spans = Spans(provider)
    with spans.publishing("fi-events", None):
        pass
    started = time.monotonic()
    spans.close()
    assert time.monotonic() - started < 5
    exporter.free.set()
    provider.shutdown()
