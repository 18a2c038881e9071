"""The description: of every route, with every problem, with the limits of the process, and valid OpenAPI 3.1.

That no answer is missing in it is checked by each test of this folder: tests/support/ingest.py compares what comes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from services.ingest.access import ACCESS, OPEN
from services.ingest.formats import MAX_EVENTS, RESOURCES
from services.ingest.openapi import describe
from services.ingest.problems import BY_SLUG, UNKNOWN_EVENT, registry
from services.ingest.reading import DEFAULT_LIMIT, MAX_LIMIT
from services.ingest.settings import Settings
from tests.support.description import answer_problems, operation_of, validator
from tests.support.ingest import Edge, dead_letter, running_edge

Json = dict[str, Any]


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_edge() as edge:
        yield edge


@pytest.fixture
def description() -> Json:
    return describe(Settings(), "1.2.3")


async def test_the_served_description_is_openapi_3_1(edge: Edge) -> None:
    """Every client gets it, without a token; a maintained validator finds no fault in it."""
    reply = await edge.request("GET", "/openapi.json")
    assert (200, "application/json", "no-cache") == (
        reply.status,
        reply.headers["Content-Type"],
        reply.headers["Cache-Control"],
    )
    assert "3.1.0" == reply.json["openapi"]
    validate(reply.json)


async def test_every_route_is_described_and_nothing_else(edge: Edge) -> None:
    """HEAD and OPTIONS follow from the others."""
    routes = {
        (route.method, route.resource.canonical)
        for route in edge.app.router.routes()
        if route.resource is not None and route.method not in {"HEAD", "OPTIONS"}
    }
    described = {(method.upper(), path) for path, methods in edge.description["paths"].items() for method in methods}
    assert routes == described


async def test_each_operation_names_the_scope_that_the_gate_asks_for(edge: Edge) -> None:
    """Where no token file is set, none is needed: the description says so, too."""
    gate = edge.app[ACCESS]
    strict = describe(Settings(token_file="tokens"), "")
    for route in edge.app.router.routes():
        if route.resource is None or route.method in {"HEAD", "OPTIONS"}:
            continue
        rule = gate.rule(route)
        assert rule is not None
        path, method = route.resource.canonical, route.method.lower()
        asked: list[Json] = [] if rule.scope is OPEN else [{"token": []}]
        assert (None if rule.scope is OPEN else str(rule.scope)) == strict["paths"][path][method].get("x-scope")
        assert asked == strict["paths"][path][method]["security"]
        assert ([{}, *asked] if asked else []) == edge.description["paths"][path][method]["security"]


def test_every_problem_is_in_an_operation_or_is_a_general_one(description: Json) -> None:
    """And none that does not exist, or under another status than its own."""
    found = set(description["x-general-problems"])
    for methods in description["paths"].values():
        for operation in methods.values():
            for status, types in answer_problems(operation).items():
                found |= set(types)
                assert {int(status)} == {BY_SLUG[kind.rpartition("/")[2]].status for kind in types}
    assert {problem.type for problem in registry()} == found


def test_linters_find_no_scope_of_a_bearer_token_and_nothing_unused(description: Json) -> None:
    """Scopes belong to OAuth alone, so ours are in x-scope; a component that nothing refers to is a leftover."""
    for methods in description["paths"].values():
        for operation in methods.values():
            assert all(scopes == [] for one in operation["security"] for scopes in one.values())
    text = orjson.dumps(description).decode()
    for kind, components in description["components"].items():
        for name in components:
            assert kind == "securitySchemes" or f'"#/components/{kind}/{name}"' in text, name


def test_the_limits_are_those_of_the_process() -> None:
    """What a client may send depends on the settings; what it reads here is what is enforced."""
    changed = Settings(max_event_bytes=2000, max_batch_bytes=3000, max_json_depth=7)
    described = describe(changed, "")
    for resource in RESOURCES:
        operation = described["paths"][resource.path]["post"]
        assert (2000, 7) == (operation["x-max-event-bytes"], operation["x-max-json-depth"])
        assert (3000, MAX_EVENTS) == (operation["x-max-batch-bytes"], operation["x-max-batch-events"])
        assert set(resource.formats) <= set(operation["requestBody"]["content"])


def test_the_constants_in_the_file_are_those_that_are_enforced(description: Json) -> None:
    """openapi.json repeats what no setting changes."""
    schemas, parameters = (description["components"][name] for name in ("schemas", "parameters"))
    assert {MAX_EVENTS} == {schemas[name]["maxItems"] for name in ("Batch", "CloudEventBatch")}
    pages = (schemas["EventPage"]["properties"]["events"], schemas["ConsultationPage"]["properties"]["consultations"])
    limit = parameters["limit"]["schema"]
    assert {MAX_LIMIT} == {limit["maximum"], *(page["maxItems"] for page in pages)}
    assert DEFAULT_LIMIT == limit["default"]
    about = description["paths"]["/problems/{slug}"]["get"]["responses"]["200"]["content"]["application/json"]
    assert orjson.loads(UNKNOWN_EVENT.render()) == about["example"]


async def test_the_described_sizes_are_the_ones_that_are_taken() -> None:
    """One byte more is 413."""
    async with running_edge(max_event_bytes=2000, max_batch_bytes=3000) as edge:
        for path, kind, name in (
            ("/consultations/c-1/events", "application/json", "x-max-event-bytes"),
            ("/consultations/c-1/events/batch", "application/x-ndjson", "x-max-batch-bytes"),
        ):
            operation = operation_of(edge.description, "POST", path)
            assert operation is not None
            for size, status in ((operation[name], 202), (operation[name] + 1, 413)):
                body = b'{"event_type":"A"}'.ljust(size, b" " if "events/batch" not in path else b"\n")
                reply = await edge.request("POST", path, data=body, headers={"Content-Type": kind})
                assert status == reply.status


def test_each_example_fits_its_schema(description: Json) -> None:
    """Of requests, of answers, of parameters."""
    checked = 0
    for methods in description["paths"].values():
        for operation in methods.values():
            contents = [operation["requestBody"]] if "requestBody" in operation else []
            for holder in contents + list(operation["responses"].values()):
                for kind, content in holder["content"].items():
                    if "example" in content:
                        checked += 1
                        validator(description, holder, kind).validate(content["example"])
    for parameter in description["components"]["parameters"].values():
        if "example" in parameter:
            checked += 1
            Draft202012Validator(parameter["schema"]).validate(parameter["example"])
    assert checked > 60


async def test_each_example_of_a_request_is_taken(edge: Edge) -> None:
    """What the description shows can be sent as it is."""
    for path, methods in edge.description["paths"].items():
        for kind, content in methods.get("post", {}).get("requestBody", {"content": {}})["content"].items():
            example = content["example"]
            headers = {"Content-Type": kind}
            if kind.startswith(("text/", "application/octet")) or (path == "/events" and kind == "application/json"):
                headers |= {
                    "ce-specversion": "1.0",
                    "ce-id": kind,
                    "ce-source": path,
                    "ce-type": "A",
                    "ce-subject": "c-1",
                }
            body = example.encode() if isinstance(example, str) else orjson.dumps(example)
            edge.log.letters.letters[3] = dead_letter(3)
            url = path.replace("{consultation}", "c-1").replace("{sequence}", "3")
            reply = await edge.request("POST", url, data=body, headers=headers)
            expected = 200 if path.startswith("/dead-letters/") else 202
            assert (expected, kind) == (reply.status, kind), reply.json


async def test_a_deployment_with_tokens_shows_it_without_one(tmp_path: Path) -> None:
    """It holds no data, and explains how to send a token."""
    (tmp_path / "tokens").write_text("# none\n")
    async with running_edge(token_file=str(tmp_path / "tokens")) as edge:
        assert [200, 200, 401] == [
            (await edge.request("GET", path)).status for path in ("/openapi.json", "/docs", "/consultations")
        ]
