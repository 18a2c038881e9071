"""The OpenAPI 3.1 description of the service, with the limits of this process in it."""

from __future__ import annotations

from typing import Any

from services.ingest import openapi_schemas as schemas
from services.ingest.batch import MAX_EVENTS
from services.ingest.handlers import body_limit
from services.ingest.openapi_operations import Operation, operations
from services.ingest.openapi_refusals import GENERAL
from services.ingest.problems import Problem
from services.ingest.resources import Form
from services.ingest.settings import Settings

Json = dict[str, Any]

_ABOUT = (
    "Takes events, stores each once, and reads them back. Every refusal is a problem document (RFC 9457); decide by "
    "its type. The problems in x-general-problems can answer any request, one that is not described here, too."
)
_TOKEN = "A token of this service, with the scope that the operation names, for the consultation in question."  # noqa: S105
#: tag of each scope, for readers
_TAGS = {"write": "Post", "read": "Read", None: "Open to everybody"}


def describe(settings: Settings, version: str) -> Json:
    """Return the description.

    Args:
        settings: of the process, whose limits it names.
        version: of the product.
    """
    paths: dict[str, Json] = {}
    for operation in operations():
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, settings)
    return {
        "openapi": "3.1.0",
        "info": {"title": "fiq", "version": version, "description": _ABOUT},
        "servers": [{"url": "/"}],
        "tags": [{"name": name} for name in _TAGS.values()],
        "paths": paths,
        "components": {
            "schemas": schemas.schemas(),
            "parameters": schemas.parameters(),
            "headers": schemas.headers(),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "description": _TOKEN}},
        },
        "x-general-problems": [problem.type for problem in GENERAL],
    }


def _operation(operation: Operation, settings: Settings) -> Json:
    described: Json = {
        "operationId": operation.name,
        "summary": operation.title,
        "description": operation.text,
        "tags": [_TAGS[operation.scope]],
        "security": _security(operation, settings),
        "parameters": [schemas.named("parameters", name) for name in operation.parameters],
        "responses": _answers(operation),
    }
    if operation.resource is not None:
        described["requestBody"] = {"required": True, "content": operation.body}
        described |= limits(set(operation.resource.forms.values()), settings)
    return described


def _security(operation: Operation, settings: Settings) -> list[Json]:
    if operation.scope is None:
        return []
    asked = [{"token": [str(operation.scope)]}]
    return asked if settings.token_file else [{}, *asked]


def limits(forms: set[Form], settings: Settings) -> Json:
    """Return the extensions that tell the limits of what is posted in *forms*."""
    told: Json = {"x-max-event-bytes": settings.max_event_bytes, "x-max-json-depth": settings.max_json_depth}
    if any(form.is_batch for form in forms):
        told |= {"x-max-batch-bytes": body_limit(Form.LINES, settings), "x-max-batch-events": MAX_EVENTS}
    return told


def _answers(operation: Operation) -> Json:
    good: Json = {"description": "Done.", "content": operation.answers}
    if operation.answer_headers:
        good["headers"] = {name: schemas.named("headers", name) for name in operation.answer_headers}
    found: dict[int, list[Problem]] = {}
    for problem in operation.problems:
        found.setdefault(problem.status, []).append(problem)
    refused = {str(status): schemas.problem_answer(status, found[status]) for status in sorted(found)}
    return {str(operation.status): good, **refused}
