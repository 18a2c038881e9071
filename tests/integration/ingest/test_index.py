"""What a client finds without having read anything: the index, the problems, and which parameters there are."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import orjson
import pytest

from services.ingest.openapi import describe, query_parameters
from services.ingest.problems import registry
from services.ingest.settings import Settings
from tests.support.ingest import Edge, running_edge

#: an operation, by method and path
PARAMETERS = query_parameters(describe(Settings(), ""))


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_edge() as edge:
        yield edge


async def test_the_index_links_to_every_part(edge: Edge) -> None:
    """Each path that can be read, with all query parameters that it takes."""
    reply = await edge.request("GET", "/")
    assert (200, "application/json", "fiq") == (reply.status, reply.headers["Content-Type"], reply.json["name"])
    linked: dict[str, set[str]] = {}
    for link in reply.json["links"].values():
        path = re.split(r"[?]|\{[?]", link)[0]
        linked.setdefault(path, set()).update(re.findall(r"[a-z]+", link[len(path) :].replace("follow=1", "follow")))
    unlinked = ("/", "/problems/{slug}", "/ui/{file}")
    assert {
        path: names for (method, path), names in PARAMETERS.items() if method == "GET" and path not in unlinked
    } == linked


@pytest.mark.parametrize(
    ("accept", "status"),
    [
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", 303),
        ("*/*", 200),
        ("application/json", 200),
        ("image/png", 200),
    ],
)
async def test_a_browser_is_sent_to_a_page(edge: Edge, accept: str, status: int) -> None:
    """A program gets the document."""
    reply = await edge.request("GET", "/", headers={"Accept": accept}, allow_redirects=False)
    assert (status, "Accept") == (reply.status, reply.headers["Vary"])
    if status == 303:
        assert 200 == (await edge.request("GET", reply.headers["Location"])).status


async def test_the_problems_are_listed(edge: Edge) -> None:
    """All of them, as their own paths show them."""
    listed = (await edge.request("GET", "/problems")).json["problems"]
    assert [problem.type for problem in registry()] == [one["type"] for one in listed]
    for one in listed[:3]:
        assert one == orjson.loads((await edge.request("GET", one["type"])).content)


@pytest.mark.parametrize(("method", "path"), sorted(PARAMETERS))
async def test_an_unknown_query_parameter_is_refused(edge: Edge, method: str, path: str) -> None:
    """With the names of those that are known, and without the one that was sent: it could be anything."""
    concrete = re.sub(r"\{[a-z_]+\}", "c-1", path)
    reply = await edge.request(
        method, concrete + "?patient=Jane", headers={"Content-Type": "application/json"}, data=b"{}"
    )
    assert (400, "/problems/invalid-parameter") == (reply.status, reply.json["type"])
    assert all(name in reply.json["detail"] for name in PARAMETERS[method, path])
    assert PARAMETERS[method, path] or "has no query parameters" in reply.json["detail"]
    assert "patient" not in reply.json["detail"]
    assert "Jane" not in reply.json["detail"]


async def test_a_parameter_that_is_sent_twice_is_refused(edge: Edge) -> None:
    """Readers would not agree on which one counts."""
    reply = await edge.request("GET", "/consultations/c-1/events?after=1&after=2")
    assert (400, "/problems/invalid-parameter") == (reply.status, reply.json["type"])
    assert "once" in reply.json["detail"]


async def test_head_takes_the_parameters_of_get(edge: Edge) -> None:
    """It is answered as GET is."""
    assert 200 == (await edge.request("HEAD", "/consultations/c-1/events?limit=5")).status
    assert 400 == (await edge.request("HEAD", "/consultations/c-1/events?limits=5")).status
