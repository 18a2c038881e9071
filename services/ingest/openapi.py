"""The OpenAPI 3.1 description of the service: `openapi.json`, with the limits and problems of this process in it.

It is JSON, as the service needs no reader of YAML otherwise. Its `x-problems`, the slugs of what an operation can be
refused with, become responses here, so that titles and details are written once, in :mod:`services.ingest.problems`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from services.ingest.batch import MAX_EVENTS
from services.ingest.handlers import body_limit
from services.ingest.problems import BY_SLUG, CONTENT_TYPE, Problem
from services.ingest.resources import Form
from services.ingest.settings import Settings

Json = dict[str, Any]

#: where the description is, for programs and for people
OPENAPI_PATH, DOCS_PATH = "/openapi.json", "/docs"
_PROBLEM_HEADERS = {"Retry-After": (409, 429, 503), "WWW-Authenticate": (401, 403)}


def describe(settings: Settings, version: str) -> Json:
    """Return the description.

    Args:
        settings: of the process, whose limits it names.
        version: of the product.
    """
    described: Json = orjson.loads((Path(__file__).parent / "openapi.json").read_bytes())
    described["info"]["version"] = version
    described["components"]["parameters"]["slug"]["schema"]["enum"] = list(BY_SLUG)
    limits = {
        "x-max-event-bytes": settings.max_event_bytes,
        "x-max-json-depth": settings.max_json_depth,
        "x-max-batch-bytes": body_limit(Form.LINES, settings),
        "x-max-batch-events": MAX_EVENTS,
    }
    for operation in (one for methods in described["paths"].values() for one in methods.values()):
        operation |= {name: limit for name, limit in limits.items() if name in operation}
        if operation["security"] and not settings.token_file:
            operation["security"].insert(0, {})
        refused: dict[int, list[Problem]] = {}
        for slug in operation.pop("x-problems"):
            refused.setdefault(BY_SLUG[slug].status, []).append(BY_SLUG[slug])
        operation["responses"] |= {str(status): _refusal(status, refused[status]) for status in sorted(refused)}
    return described


def _refusal(status: int, problems: list[Problem]) -> Json:
    """Return the answer *status* that is one of the *problems*."""
    first, types = problems[0], [problem.type for problem in problems]
    told = {"properties": {"type": {"enum": types}, "status": {"const": status}}}
    schema = {"allOf": [{"$ref": "#/components/schemas/Problem"}, told]}
    example = {"type": first.type, "title": first.title, "status": status, "detail": first.detail}
    answer: Json = {
        "description": "; ".join(problem.title for problem in problems) + ".",
        "content": {CONTENT_TYPE: {"schema": schema, "example": example}},
    }
    names = [name for name, has in _PROBLEM_HEADERS.items() if status in has]
    return answer | ({"headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names}} if names else {})
