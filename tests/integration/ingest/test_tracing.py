"""A trace from the request through the broker to HDF5, with real processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import nats
from aiohttp import ClientSession, web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from services.cli.embedded.processes import Cluster
from services.log.jetstream.stream import STREAM
from tests.support.persisters import PARTITIONS, Persister
from tests.support.polling import eventually
from tests.support.service import Service

ID, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{ID}-{SPAN}-01"
PATH = "/consultations/c-1/events"
ONE = b'{"event_type":"A"}'


@asynccontextmanager
async def pipeline(folder: Path, cluster: Cluster, **settings: str) -> AsyncIterator[tuple[Service, Persister, str]]:
    """Run an ingest and a persister, and yield both with the URL of the first."""
    own = {"FI_PORT": "0", "FI_STREAM_MAX_BYTES": "64MiB", "FI_DEAD_MAX_BYTES": "1MiB"}
    own |= {"FI_LOG_URL": ",".join(cluster.urls), "FI_PARTITIONS": str(PARTITIONS)} | settings
    with (
        Service(folder, "services.ingest", **own) as ingest,
        Persister(folder / "p", cluster, folder / "data", FI_DEAD_MAX_BYTES="1MiB", **settings) as persister,
    ):
        port = (await asyncio.to_thread(ingest.wait_for, "INGEST_STARTED"))["port"]
        await persister.ready()
        yield ingest, persister, f"http://127.0.0.1:{port}"


async def post(url: str, body: bytes, kind: str = "application/json", **headers: str) -> None:
    async with (
        ClientSession() as session,
        session.post(url, data=body, headers={"Content-Type": kind} | headers) as response,
    ):
        assert 202 == response.status


async def stored_headers(cluster: Cluster, sequence: int) -> dict[str, str]:
    connection = await nats.connect(cluster.urls)
    try:
        return dict((await connection.jetstream().get_msg(STREAM, sequence)).headers or {})
    finally:
        await connection.close()


async def test_a_trace_is_in_the_message_and_in_both_logs(fresh_log: Cluster, tmp_path: Path) -> None:
    """Single events and atomic batches; an event without a trace has no header more than ever."""
    async with pipeline(tmp_path, fresh_log) as (ingest, persister, url):
        await post(url + PATH, ONE, traceparent=PARENT, tracestate="a=1, b=2")
        await post(url + PATH, ONE)
        other = PARENT.replace(ID, ID[::-1])
        await post(f"{url}{PATH}/batch", ONE + b"\n" + ONE, "application/x-ndjson", traceparent=other)

        headers = [await stored_headers(fresh_log, sequence) for sequence in (1, 2, 3, 4)]
        shown = [(header.get("traceparent"), header.get("tracestate")) for header in headers]
        assert [(PARENT, "a=1,b=2"), (None, None), (other, None), (other, None)] == shown
        assert {"Nats-Msg-Id", "Fi-Received-Ns"} == headers[1].keys()

        def traced() -> dict[str, tuple[int, int]]:
            lines = [line for line in persister.lines if line["event"] == "EVENT_TRACED"]
            return {line["trace_id"]: (line["sequence"], line["events"]) for line in lines}

        await eventually(lambda: len(traced()) == 2)
        assert (1, 1) == traced()[ID]
        assert 3 == traced()[ID[::-1]][0]
        queued = {line["event"]: line.get("trace_id") for line in ingest.lines if line["event"] == "BATCH_QUEUED"}
        assert {"BATCH_QUEUED": ID[::-1]} == queued
        queued_one = [line.get("trace_id") for line in ingest.lines if line["event"] == "EVENT_QUEUED"]
        assert [ID, None] == queued_one


async def test_spans_go_to_a_collector(fresh_log: Cluster, tmp_path: Path) -> None:
    """Over OTLP, by OpenTelemetry's own variables: request, publish and the batch that links to it."""
    spans: dict[str, Span] = {}

    async def take(request: web.Request) -> web.Response:
        document = ExportTraceServiceRequest.FromString(await request.read())
        for resource in document.resource_spans:
            for scope in resource.scope_spans:
                spans.update((span.name, span) for span in scope.spans)
        return web.Response(content_type="application/x-protobuf")

    app = web.Application()
    app.router.add_post("/v1/traces", take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        port = runner.addresses[0][1]
        asked = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}", "OTEL_EXPORTER_OTLP_COMPRESSION": "none"}
        async with pipeline(tmp_path, fresh_log, **asked) as (ingest, persister, url):
            await post(url + PATH, ONE, traceparent=PARENT)
            await asyncio.to_thread(persister.wait_for, "EVENT_PERSISTED")
            for service in (ingest, persister):
                service.terminate()
                assert 0 == await asyncio.to_thread(service.wait)
            assert "LIBRARY" not in {line["event"] for line in [*ingest.lines, *persister.lines]}
        serve = spans[f"POST {PATH.replace('c-1', '{consultation}')}"]
        publish, batch = spans["publish fi-events"], spans["persist fi-events"]
        assert (ID, ID) == (serve.trace_id.hex(), publish.trace_id.hex())
        assert (SPAN, serve.span_id) == (serve.parent_span_id.hex(), publish.parent_span_id)
        assert [(publish.trace_id, publish.span_id)] == [(link.trace_id, link.span_id) for link in batch.links]
        assert publish.span_id.hex() in (await stored_headers(fresh_log, 1))["traceparent"]
    finally:
        await runner.cleanup()
