"""The HTTP around the resource: methods, paths, management, and what aiohttp answers by itself."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from services.ingest.problems import ProblemType, registry
from tests.support.ingest import Edge, running_edge

EVENTS = "/consultations/c-1/events"
#: resource -> its methods
ALLOWED = {
    EVENTS: ["GET", "HEAD", "OPTIONS", "POST"],
    EVENTS + "/6f1b1d4e-0000-4000-8000-000000000000": ["GET", "HEAD", "OPTIONS"],
    "/consultations": ["GET", "HEAD", "OPTIONS"],
}


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_edge() as edge:
        yield edge


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("path", ALLOWED)
async def test_another_method_is_405_with_allow(edge: Edge, method: str, path: str) -> None:
    """RFC 9110, section 15.5.6: the answer must list what is allowed."""
    reply = await edge.request(method, path)
    assert (reply.status, reply.json["type"]) == (405, "/problems/method-not-allowed")
    assert set(ALLOWED[path]) == set(reply.headers["Allow"].replace(" ", "").split(","))


async def test_head_is_answered_without_a_body(edge: Edge) -> None:
    """With the headers that GET would get."""
    await edge.post()
    for path in (EVENTS, EVENTS + "?limit=no", "/consultations"):
        get, head = await edge.request("GET", path), await edge.request("HEAD", path)
        assert (get.status, b"") == (head.status, head.content)
        assert get.headers["Content-Type"] == head.headers["Content-Type"]
    assert (await edge.manage("/healthz", "HEAD")).status == 200


@pytest.mark.parametrize("path", ALLOWED)
async def test_options_lists_the_methods(edge: Edge, path: str) -> None:
    """204, nothing else."""
    reply = await edge.request("OPTIONS", path)
    assert (reply.status, reply.headers["Allow"], reply.content) == (204, ", ".join(sorted(ALLOWED[path])), b"")


@pytest.mark.parametrize(
    "path", ["//", "/nope", "/consultations/", "/consultations//events", EVENTS + "/", "/problems/x"]
)
async def test_an_unknown_path_is_404(edge: Edge, path: str) -> None:
    """As a problem document, not as aiohttp's text."""
    reply = await edge.request("POST" if path.startswith("/cons") else "GET", path)
    assert (reply.status, reply.json["type"]) == (404, "/problems/not-found")
    assert reply.json["detail"] == "There is no resource at this path: GET / lists all."
    assert reply.headers["Content-Type"] == "application/problem+json"


@pytest.mark.parametrize("problem", registry(), ids=lambda problem: problem.slug)
async def test_the_type_of_a_problem_can_be_looked_up(edge: Edge, problem: ProblemType) -> None:
    """A type that is an address should lead somewhere (RFC 9457, section 3.1.1)."""
    reply = await edge.request("GET", problem.type)
    assert (200, problem.type) == (reply.status, reply.json["type"])


async def test_no_answer_names_the_library(edge: Edge) -> None:
    """Clients need not know the library and its version."""
    replies = [await edge.post(), await edge.post(body=b"{"), await edge.request("GET", "/nope")]
    assert {"fiq"} == {reply.headers["Server"] for reply in replies}


async def test_readiness_is_what_the_log_says(edge: Edge) -> None:
    """With the reason."""
    edge.log.reasons = ["stream fi-events has no leader"]
    reply = await edge.manage("/readyz")
    assert (reply.status, reply.json["reasons"]) == (503, ["stream fi-events has no leader"])


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
async def test_clients_do_not_reach_the_management_endpoints(edge: Edge, path: str) -> None:
    """They have a listener of their own, which serves nothing else."""
    assert 404 == (await edge.request("GET", path)).status
    assert 200 == (await edge.manage(path)).status
    assert 404 == (await edge.manage(EVENTS)).status


async def test_metrics_hold_the_process_and_never_a_consultation(edge: Edge) -> None:
    """An id as a label would make one series a consultation."""
    await edge.post("very-special-consultation")
    reply = await edge.manage("/metrics")
    text = reply.content.decode()
    for name in ("fi_ingest_requests_total", "process_resident_memory_bytes", "python_gc_collections_total"):
        assert name in text
    assert "very-special" not in text


async def test_every_problem_has_its_series_from_the_start(edge: Edge) -> None:
    """A rate over a series that appears with its first error misses that error."""
    text = (await edge.manage("/metrics")).content.decode()
    for problem in registry():
        assert f'fi_ingest_requests_total{{problem="{problem.slug}",status="{problem.status}"}} 0.0' in text
