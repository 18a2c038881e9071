"""What bodies and parameters look like: the components of the OpenAPI description."""

from __future__ import annotations

from typing import Any

from services.ingest.batch import MAX_EVENTS
from services.ingest.problems import CONTENT_TYPE, Problem, registry
from services.ingest.reading_records import DEFAULT_LIMIT, MAX_LIMIT

Json = dict[str, Any]

#: largest position of the log
_MAX_POSITION = 2**63 - 1
_ID_PATTERN = "^[A-Za-z0-9_-]{1,128}$"
MESSAGE_ID = "5a6b0c1d-2e3f-4a5b-8c7d-9e0f1a2b3c4d"

EVENT: Json = {"event_type": "MESSAGE_RECEIVED", "payload": {"text": "Good morning"}}
LINE: Json = {**EVENT, "event_id": "visit-17-line-9"}
CLOUDEVENT: Json = {
    "specversion": "1.0",
    "id": "17-9",
    "source": "/wards/3",
    "subject": "c-1",
    "type": "MESSAGE_RECEIVED",
    "data": {"text": "Good night"},
}
ACCEPTED: Json = {"status": "accepted", "message_id": MESSAGE_ID, "consultation_id": "c-1", "sequence": 1}
RESULT: Json = {name: value for name, value in ACCEPTED.items() if name != "status"}
STORED: Json = {
    "sequence": 1,
    "message_id": MESSAGE_ID,
    "received": "2026-11-25T02:00:00.123456789Z",
    "status": "persisted",
    "event": EVENT,
}


def ref(name: str) -> Json:
    """Return a reference to the schema *name*."""
    return {"$ref": f"#/components/schemas/{name}"}


def named(group: str, name: str) -> Json:
    """Return a reference to the component *name* of another *group*: parameters, headers."""
    return {"$ref": f"#/components/{group}/{name}"}


def _object(required: str, properties: Json, **more: Any) -> Json:
    return {"type": "object", "required": required.split(), "properties": properties, **more}


def _stored() -> Json:
    return {
        "sequence": {"type": "integer", "minimum": 1, "description": "Its place in the log."},
        "message_id": {"type": "string", "format": "uuid"},
        "received": {"type": "string", "format": "date-time", "description": "When ingest took it."},
        "status": {"enum": ["queued", "persisted"], "description": "In the log still, or in HDF5."},
        "event": {"type": "object", "description": "The body as it was stored, byte for byte."},
    }


def schemas() -> Json:
    """Return every schema, by its name."""
    consultation = {"type": "string", "pattern": _ID_PATTERN}
    event = {
        "event_type": {"type": "string", "minLength": 1},
        "payload": {"description": "Any JSON; further members are kept, too."},
    }
    line = {
        **event,
        "event_id": {"type": ["string", "null"], "pattern": "^[!-~]{1,255}$", "description": "The key of this line."},
        "consultation_id": {"type": ["string", "null"], "pattern": _ID_PATTERN},
    }
    result = {
        "message_id": {"type": "string", "format": "uuid"},
        "consultation_id": consultation,
        "sequence": {"type": "integer", "minimum": 1, "description": "Its place in the log."},
        "duplicate": {"const": True, "description": "It was stored before, under the same key, with the same body."},
    }
    text = {"type": "string", "minLength": 1}
    cloudevent = {
        "specversion": {"const": "1.0"},
        **dict.fromkeys(("id", "source", "type"), text),
        "subject": {"type": ["string", "null"], "pattern": _ID_PATTERN, "description": "The consultation."},
        "datacontenttype": {"type": ["string", "null"]},
        "data": {"description": "Any JSON; becomes payload."},
        "data_base64": {"type": ["string", "null"], "contentEncoding": "base64"},
    }
    extension = {"type": ["string", "integer", "boolean", "null"]}
    problem = {
        "type": {"type": "string", "format": "uri-reference", "pattern": "^/problems/"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "lines": {"type": "array", "items": ref("RefusedLine")},
        "results": {"type": "array", "items": ref("Result")},
    }
    refused = {"line": {"type": "integer", "minimum": 1}, "reason": {"type": "string"}}
    following = {"type": ["string", "null"], "format": "uri-reference", "description": "Where the next page is."}
    page = {"events": {"type": "array", "items": ref("StoredEvent"), "maxItems": MAX_LIMIT}, "next": following}
    listed = {"type": "array", "items": ref("Consultation"), "maxItems": MAX_LIMIT}
    return {
        "Event": _object("event_type", event),
        "Line": _object("event_type", line),
        "Batch": {"type": "array", "items": ref("Line"), "minItems": 1, "maxItems": MAX_EVENTS},
        "CloudEvent": _object(
            "specversion id source type",
            cloudevent,
            patternProperties={"^(?!data$)[a-z0-9]{1,64}$": extension},
            additionalProperties=False,
        ),
        "CloudEventBatch": {"type": "array", "items": ref("CloudEvent"), "minItems": 1, "maxItems": MAX_EVENTS},
        "Accepted": _object("status message_id consultation_id sequence", {"status": {"const": "accepted"}, **result}),
        "Result": _object(
            "message_id consultation_id", {**result, "problem": {"type": "string", "format": "uri-reference"}}
        ),
        "BatchAccepted": _object(
            "status results",
            {"status": {"const": "accepted"}, "results": {"type": "array", "items": ref("Result")}},
        ),
        "StoredEvent": _object("sequence message_id received status event", _stored()),
        "OneEvent": _object(
            "consultation_id sequence message_id received status event",
            {"consultation_id": consultation, **_stored()},
        ),
        "EventPage": _object("consultation_id events next", {"consultation_id": consultation, **page}),
        "Consultation": _object("consultation_id", {"consultation_id": consultation}),
        "ConsultationPage": _object("consultations next", {"consultations": listed, "next": following}),
        "Problem": _object("type title status detail", problem, description="RFC 9457."),
        "RefusedLine": _object("line reason", refused),
    }


def parameters() -> Json:
    """Return every parameter, by the name under which operations refer to it."""
    position = {"type": "integer", "minimum": 0, "maximum": _MAX_POSITION}
    prefix = {"type": "string", "pattern": "^[A-Za-z0-9_-]{0,128}$"}
    key = {"type": "string", "pattern": '^([!#-~][!-~]{0,254}|"[!-~]{1,255}")$'}
    slugs = [problem.slug for problem in registry()]
    return {
        "consultation": _path("consultation", {"type": "string", "pattern": _ID_PATTERN}, "Its id.", "c-1"),
        "message_id": _path("message_id", {"type": "string", "format": "uuid"}, "Of the answer 202.", MESSAGE_ID),
        "slug": _path("slug", {"type": "string", "enum": slugs}, "Of the problem.", slugs[0]),
        "after": _query("after", {**position, "default": 0}, "The sequence behind which the page begins.", 0),
        "follow": _query(
            "follow", {"enum": [0, 1], "default": 0}, "1: what comes later, too, as text/event-stream.", 0
        ),
        "limit": _query(
            "limit",
            {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT},
            "Most records of the page.",
            DEFAULT_LIMIT,
        ),
        "prefix": _query("prefix", prefix, "What the ids begin with.", "c-"),
        "after_id": _query("after", prefix, "The last id of the page before.", "c-0"),
        "Idempotency-Key": _header("Idempotency-Key", key, "Makes a retry safe: unique in the consultation.", "v17-3"),
        "Last-Event-ID": _header("Last-Event-ID", position, "With follow=1: the last sequence that was seen.", 0),
        **{
            name: _header(name, {"type": "string"}, "Of a CloudEvent in the binary mode.", None)
            for name in ("ce-specversion", "ce-id", "ce-source", "ce-type", "ce-subject")
        },
    }


def headers() -> Json:
    """Return every header of answers, by its name."""
    return {
        "Location": _answered({"type": "string", "format": "uri-reference"}, "Where the event can be read."),
        "Link": _answered({"type": "string"}, 'The next page, with rel="next"; absent from the last one.', False),
        "Retry-After": _answered({"type": "integer", "minimum": 1}, "Seconds to wait before the same is sent again."),
        "WWW-Authenticate": _answered({"type": "string"}, "What kind of token is asked for."),
    }


def problem_answer(status: int, problems: list[Problem]) -> Json:
    """Return the answer *status* that is one of the *problems*."""
    types = [problem.type for problem in problems]
    schema = {"allOf": [ref("Problem"), {"properties": {"type": {"enum": types}, "status": {"const": status}}}]}
    first = problems[0]
    example = {"type": first.type, "title": first.title, "status": status, "detail": first.detail}
    answer: Json = {
        "description": "; ".join(problem.title for problem in problems) + ".",
        "content": {CONTENT_TYPE: {"schema": schema, "example": example}},
    }
    names = [name for name, has in _PROBLEM_HEADERS.items() if status in has]
    return answer | ({"headers": {name: named("headers", name) for name in names}} if names else {})


_PROBLEM_HEADERS = {"Retry-After": (409, 429, 503), "WWW-Authenticate": (401, 403)}


def _path(name: str, schema: Json, text: str, example: Any) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": schema, "description": text, "example": example}


def _query(name: str, schema: Json, text: str, example: Any) -> Json:
    return {"name": name, "in": "query", "schema": schema, "description": text, "example": example}


def _header(name: str, schema: Json, text: str, example: Any) -> Json:
    shown = {} if example is None else {"example": example}
    return {"name": name, "in": "header", "schema": schema, "description": text, **shown}


def _answered(schema: Json, text: str, required: bool = True) -> Json:
    return {"schema": schema, "description": text, "required": required}
