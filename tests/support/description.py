"""Whether an answer is one that the service's OpenAPI description has."""

from __future__ import annotations

import re
from typing import Any

import orjson
from aiohttp import ClientResponse
from jsonschema import Draft202012Validator

Json = dict[str, Any]


def operation_of(description: Json, method: str, path: str) -> Json | None:
    """Return the operation that a request is for; None when there is none."""
    found = []
    for template, methods in description["paths"].items():
        pattern = re.sub(r"\{[^}]*\}", "[^/]+", template)
        if re.fullmatch(pattern, path.partition("?")[0]) and method.lower() in methods:
            found.append((template.count("{"), methods[method.lower()]))
    return min(found, key=lambda one: one[0])[1] if found else None


def check_answer(description: Json, method: str, path: str, response: ClientResponse, content: bytes) -> None:
    """Check status, media type, headers and body of an answer.

    Raises:
        AssertionError: it is not described.
    """
    operation = operation_of(description, method, path)
    if operation is None:
        kind = orjson.loads(content)["type"] if response.status >= 400 and content else None
        # a route that a test has added may be forbidden, too
        assert kind in {None, *description["x-general-problems"], "/problems/forbidden"}
        return
    what = f"{operation['operationId']} {response.status}"
    assert str(response.status) in operation["responses"], f"{what} is not described: {content[:200]!r}"
    answer = operation["responses"][str(response.status)]
    assert response.content_type in answer["content"], f"{what} comes as {response.content_type}"
    for name, header in answer.get("headers", {}).items():
        required = description["components"]["headers"][header["$ref"].rpartition("/")[2]]["required"]
        assert name in response.headers or not required, f"{what} lacks {name}"
    if re.search(r"[/+]json$", response.content_type):
        errors = [
            error.message
            for error in validator(description, answer, response.content_type).iter_errors(orjson.loads(content))
        ]
        assert not errors, f"{what}: {errors}"


def validator(description: Json, answer: Json, kind: str) -> Draft202012Validator:
    """Return what checks the body of an answer."""
    schema = answer["content"][kind]["schema"]
    return Draft202012Validator({**schema, "components": description["components"]})


def answer_problems(operation: Json) -> dict[str, list[str]]:
    """Return the types of problems that an operation answers with, by status."""
    return {
        status: next(part for part in content["schema"]["allOf"] if "properties" in part)["properties"]["type"]["enum"]
        for status, answer in operation["responses"].items()
        for kind, content in answer["content"].items()
        if kind == "application/problem+json"
    }
