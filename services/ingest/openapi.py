"""The OpenAPI 3.1 description: ``openapi.json`` with the limits of this process, and a page for people made from it.

It is JSON because the service needs no YAML parser otherwise. The slugs in ``x-problems`` of an operation become
responses here, so that titles and details are written once, in :mod:`services.ingest.problems`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web

from services.ingest import ui
from services.ingest.formats import MAX_EVENTS, BodyFormat
from services.ingest.problems import BY_SLUG, CONTENT_TYPE, ProblemType
from services.ingest.settings import Settings

PAGE_TYPE = "text/html; charset=utf-8"
_STYLE = (Path(__file__).parent / "docs.css").read_text(encoding="utf-8").strip()
_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
#: nothing is loaded, run, sent or framed; the one style sheet is named by its hash
PAGE_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
#: a host name, or an address, with or without a port
_HOST = re.compile(r"(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?", re.ASCII)
_LIMITS = {
    "x-max-event-bytes": "bytes of an event",
    "x-max-batch-bytes": "bytes of a batch",
    "x-max-batch-events": "events of a batch",
    "x-max-json-depth": "levels of JSON",
}
#: problems of every operation
_OF_ALL = (
    "malformed-request",
    "header-timeout",
    "expectation-failed",
    "internal-error",
    "invalid-parameter",
    "too-many-connections",
)
Json = dict[str, Any]

#: the description for programs, and for people
OPENAPI_PATH, DOCS_PATH = "/openapi.json", "/docs"
_PROBLEM_HEADERS = {"Retry-After": (409, 429, 503), "WWW-Authenticate": (401, 403)}


def describe(settings: Settings, version: str) -> Json:
    """Return the description of a process with *settings*; *version* is the product's."""
    described: Json = orjson.loads((Path(__file__).parent / "openapi.json").read_bytes())
    described["info"]["version"] = version
    described["components"]["parameters"]["slug"]["schema"]["enum"] = list(BY_SLUG)
    described["components"]["parameters"]["file"]["schema"]["enum"] = ui.names()
    limits = {
        "x-max-event-bytes": settings.max_event_bytes,
        "x-max-json-depth": settings.max_json_depth,
        "x-max-batch-bytes": BodyFormat.LINES.limit(settings),
        "x-max-batch-events": MAX_EVENTS,
    }
    for operation in (one for methods in described["paths"].values() for one in methods.values()):
        operation |= {name: limit for name, limit in limits.items() if name in operation}
        if operation["security"] and not settings.token_file:
            operation["security"].insert(0, {})
        refused: dict[int, list[ProblemType]] = {}
        for slug in dict.fromkeys((*_OF_ALL, *operation.pop("x-problems"))):
            refused.setdefault(BY_SLUG[slug].status, []).append(BY_SLUG[slug])
        operation["responses"] |= {str(status): _refusal(status, refused[status]) for status in sorted(refused)}
    return described


def query_parameters(description: Json) -> dict[tuple[str, str], frozenset[str]]:
    """Return the names of the query parameters of each operation, by method and path."""
    return {
        (method.upper(), path): frozenset(
            one["name"] for one in _parameters(description, operation) if one["in"] == "query"
        )
        for path, method, operation in _operations(description)
    }


def _refusal(status: int, problems: list[ProblemType]) -> Json:
    """Return the response *status* with one of *problems*."""
    first, types = problems[0], [problem.type for problem in problems]
    narrowed = {"properties": {"type": {"enum": types}, "status": {"const": status}}}
    schema = {"allOf": [{"$ref": "#/components/schemas/Problem"}, narrowed]}
    example = {"type": first.type, "title": first.title, "status": status, "detail": first.detail}
    answer: Json = {
        "description": "; ".join(problem.title for problem in problems) + ".",
        "content": {CONTENT_TYPE: {"schema": schema, "example": example}},
    }
    names = [name for name, has in _PROBLEM_HEADERS.items() if status in has]
    return answer | ({"headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names}} if names else {})


# -- the page for people: plain HTML that loads nothing ---------------------------------------------------------------


def own_url(request: web.BaseRequest) -> str:
    """Return the URL of this service as the client of *request* names it; behind a proxy, the proxy's."""
    host = request.headers.get("Host", "")
    if _HOST.fullmatch(host) is None:
        host = "127.0.0.1:7001"
    scheme = request.headers.get("X-Forwarded-Proto", request.scheme)
    return f"{'https' if scheme == 'https' else 'http'}://{host}"


def as_page(description: Json, url: str) -> bytes:
    """Return the page that shows *description* of the service at *url*."""
    info = description["info"]
    found = list(_operations(description))
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(info['title'])}: HTTP</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info['description'])}</p>",
        '<p>For programs: <a href="/openapi.json">/openapi.json</a>, OpenAPI 3.1.</p>',
        _list(
            f'<a href="#{name(one)}">{_title(path, method)}</a> {escape(one["summary"])}' for path, method, one in found
        ),
    ]
    for tag in description["tags"]:
        parts.append(f"<h2>{escape(tag['name'])}</h2>")
        parts += [_section(description, url, *one) for one in found if tag["name"] in one[2]["tags"]]
    parts.append("<h2>Any request</h2><p>Any request can be answered with these problems.</p>")
    parts.append(_list(_problem(kind) for kind in description["x-general-problems"]))
    parts.append("</body></html>\n")
    return "\n".join(parts).encode()


def curl(description: Json, url: str, path: str, method: str, operation: Json) -> str:
    """Return a curl command for *operation* of the service at *url*, with its examples."""
    query = [
        f"{one['name']}={one['example']}"
        for one in _parameters(description, operation)
        if one["in"] == "query" and "example" in one
    ]
    for one in _parameters(description, operation):
        if one["in"] == "path":
            path = path.replace("{" + one["name"] + "}", str(one["example"]))
    url += path + ("?" + "&".join(query) if query else "")
    words = ["curl", *(["-X", method.upper()] if method not in ("get", "post") else []), url]
    if operation["security"]:
        words += ["-H", "Authorization: Bearer …"]
    for kind, content in list(operation.get("requestBody", {}).get("content", {}).items())[:1]:
        body = content["example"]
        text = body if isinstance(body, str) else json.dumps(body)
        words += ["-H", f"Content-Type: {kind}", "--data-binary", text]
    return shlex.join(words)


def name(operation: Json) -> str:
    """Return the anchor of *operation*."""
    return escape(operation["operationId"])


def _operations(description: Json) -> Iterator[tuple[str, str, Json]]:
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def _section(description: Json, url: str, path: str, method: str, operation: Json) -> str:
    parts = [
        f'<section id="{name(operation)}"><h3>{_title(path, method)}</h3>',
        f"<p><b>{escape(operation['summary'])}.</b> {escape(operation['description'])}</p>",
        f"<p>{_access(operation)}</p>",
    ]
    parameters = _parameters(description, operation)
    if parameters:
        parts.append(_table(("parameter", "in", ""), [_parameter(one) for one in parameters]))
    if kinds := operation.get("requestBody", {}).get("content"):
        parts.append("<p>Takes " + ", ".join(f"<code>{escape(kind)}</code>" for kind in kinds) + ".</p>")
        parts.append(_list(f"at most {operation[key]:,} {text}" for key, text in _LIMITS.items() if key in operation))
    parts.append(_table(("answer", "", ""), [_answer(*one) for one in operation["responses"].items()]))
    parts.append(f"<pre>{escape(curl(description, url, path, method, operation))}</pre>")
    for content in operation["responses"].values():
        example = next((kind["example"] for kind in content["content"].values() if "example" in kind), None)
        if example is not None:
            parts.append(f"<pre>{escape(json.dumps(example, indent=2))}</pre>")
        break  # the successful response comes first
    return "".join([*parts, "</section>"])


def _title(path: str, method: str) -> str:
    return f'<code><span class="method">{escape(method.upper())}</span> {escape(path)}</code>'


def _access(operation: Json) -> str:
    if not operation["security"]:
        return "Needs no token."
    asked = "Needs" if {} not in operation["security"] else "This process needs no token; others need"
    return f"{asked} a token with the scope <b>{escape(operation['x-scope'])}</b>."


def _parameters(description: Json, operation: Json) -> list[Json]:
    found = description["components"]["parameters"]
    return [found[one["$ref"].rpartition("/")[2]] for one in operation["parameters"]]


def _parameter(one: Json) -> tuple[str, ...]:
    schema = json.dumps(one["schema"], ensure_ascii=False)
    text = f"{escape(one['description'])} <code>{escape(schema)}</code>"
    return f"<code>{escape(one['name'])}</code>", escape(one["in"]), text


def _answer(status: str, answer: Json) -> tuple[str, ...]:
    kinds = ", ".join(f"<code>{escape(kind)}</code>" for kind in answer["content"])
    return f"<b>{escape(status)}</b>", kinds, ", ".join(map(_problem, _types(answer))) or escape(answer["description"])


def _types(answer: Json) -> list[str]:
    for content in answer["content"].values():
        for schema in content["schema"].get("allOf", ()):
            if "type" in schema.get("properties", {}):
                return list(schema["properties"]["type"]["enum"])
    return []


def _problem(kind: str) -> str:
    return f'<a href="{escape(kind)}">{escape(kind.rpartition("/")[2])}</a>'


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = "".join(f"<th>{text}</th>" for text in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"
