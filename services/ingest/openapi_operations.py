"""What each route does, asks for and answers: the operations of the OpenAPI description."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from services.contract.tokens import Scope
from services.ingest import openapi_refusals as refusals
from services.ingest import openapi_schemas as schemas
from services.ingest import problems
from services.ingest import reading_records as records
from services.ingest.problems import Problem
from services.ingest.resources import ANY_BATCH, ANY_CLOUDEVENTS, BATCH, EVENTS, Form, Resource

Json = dict[str, Any]

#: where the description is, for programs and for people
OPENAPI_PATH = "/openapi.json"
DOCS_PATH = "/docs"
#: what a body holds in each form: its schema, and an example
_BODIES: Mapping[Form, tuple[Json, Any]] = {
    Form.EVENT: (schemas.ref("Event"), schemas.EVENT),
    Form.LINES: (
        {"type": "string", "description": "NDJSON: a line a Line; empty lines are skipped."},
        '{"event_type": "MESSAGE_RECEIVED", "payload": {"text": "Here."}, "consultation_id": "c-1"}\n',
    ),
    Form.ARRAY: (schemas.ref("Batch"), [{**schemas.LINE, "consultation_id": "c-1"}]),
    Form.CLOUDEVENT: (schemas.ref("CloudEvent"), schemas.CLOUDEVENT),
    Form.CLOUDEVENT_BATCH: (schemas.ref("CloudEventBatch"), [schemas.CLOUDEVENT]),
}
_CLOUDEVENT_HEADERS = ("ce-specversion", "ce-id", "ce-source", "ce-type", "ce-subject")
#: bodies that are the data of a CloudEvent whose attributes are headers
_BINARY: Json = {
    "application/json": {"schema": {}, "example": schemas.CLOUDEVENT["data"]},
    "text/plain": {"schema": {"type": "string"}, "example": "Good night"},
    "application/octet-stream": {"schema": {"type": "string"}, "example": "GIF89a"},
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path.

    Attributes:
        method: of HTTP.
        path: as the router knows it.
        name: unique, for programs.
        title: one line.
        text: what to know before it is used, as paragraphs of plain text.
        scope: what the token needs; None for everybody.
        problems: what it is refused with.
        status: of its good answer.
        answers: media types of the good answer, each with schema and example.
        parameters: names of components.
        body: media types of the request's body, each with schema and example.
        resource: to which is posted, if it is one of those.
        answer_headers: names of components, of the good answer.
    """

    method: str
    path: str
    name: str
    title: str
    text: str
    scope: Scope | None
    problems: tuple[Problem, ...]
    status: int
    answers: Json
    parameters: tuple[str, ...] = ()
    body: Json = field(default_factory=dict)
    resource: Resource | None = None
    answer_headers: tuple[str, ...] = ()


def operations() -> list[Operation]:
    """Return every operation, in the order in which a reader wants them."""
    return [
        _post(
            EVENTS,
            "postEvent",
            "Post an event",
            "202 means that a quorum of the cluster has it on disk. A retry with the same Idempotency-Key is the same "
            "event. CloudEvents come in the binary mode (ce-… headers), structured, or as a batch.",
        ),
        _post(
            BATCH,
            "postBatch",
            "Post many events of a consultation",
            "Lines that are no events are named in lines, and nothing is stored then. A line without an event_id has "
            "the key <Idempotency-Key>:<line number>.",
        ),
        _post(
            ANY_BATCH,
            "postAnyBatch",
            "Post events of many consultations",
            "As the batch of one consultation, but each line names its own in consultation_id.",
        ),
        _post(
            ANY_CLOUDEVENTS,
            "postCloudEvent",
            "Post a CloudEvent",
            "Its subject names the consultation; source and id together are its key, so there is no Idempotency-Key. "
            "In the binary mode any other media type is taken, too.",
        ),
        *_reads(),
        *_open(),
    ]


def _post(resource: Resource, name: str, title: str, text: str) -> Operation:
    forms = set(resource.forms.values()) | ({Form.CLOUDEVENT_BINARY} if resource.binary else set())
    many, one = any(form.is_batch for form in forms), any(not form.is_batch for form in forms)
    of_path = "{consultation}" in resource.path
    body = {kind: dict(zip(("schema", "example"), _BODIES[form], strict=True)) for kind, form in resource.forms.items()}
    if resource.binary:
        body |= {kind: content for kind, content in _BINARY.items() if kind not in body}
    refused = refusals.POSTED + ((problems.INVALID_EVENT,) if one else ()) + (refusals.BATCHED if many else ())
    taken = [schemas.ref("Accepted")] * one + [schemas.ref("BatchAccepted")] * many
    example = schemas.ACCEPTED if one else {"status": "accepted", "results": [schemas.RESULT]}
    keyed = resource is not ANY_CLOUDEVENTS
    return Operation(
        "POST",
        resource.path,
        name,
        title,
        text,
        Scope.WRITE,
        refusals.ALWAYS + refusals.GUARDED + refused + ((problems.INVALID_CONSULTATION_ID,) if of_path else ()),
        202,
        {records.JSON: {"schema": taken[0] if len(taken) == 1 else {"oneOf": taken}, "example": example}},
        ("consultation",) * of_path + ("Idempotency-Key",) * keyed + _CLOUDEVENT_HEADERS * resource.binary,
        body,
        resource,
    )


def _reads() -> list[Operation]:
    lines = {"schema": {"type": "string"}}
    page = {"consultation_id": "c-1", "events": [schemas.STORED], "next": None}
    return [
        Operation(
            "GET",
            EVENTS.path,
            "listEvents",
            "Read a consultation",
            "What is in HDF5, then what still waits in the log: without gaps, each once, one's own writes included. "
            "With follow=1 Server-Sent Events that begin behind after, or Last-Event-ID, and go on.",
            Scope.READ,
            (
                *refusals.ALWAYS,
                *refusals.GUARDED,
                *refusals.READ,
                *refusals.PAGED,
                problems.INVALID_CONSULTATION_ID,
                problems.TOO_MANY_FOLLOWERS,
            ),
            200,
            {
                records.JSON: {"schema": schemas.ref("EventPage"), "example": page},
                records.NDJSON: lines,
                records.EVENT_STREAM: lines,
            },
            ("consultation", "after", "limit", "follow", "Last-Event-ID"),
            answer_headers=("Link",),
        ),
        Operation(
            "GET",
            EVENTS.path + "/{message_id}",
            "getEvent",
            "Read one event",
            "The Location of its 202. Its status says whether it is in HDF5 already.",
            Scope.READ,
            (
                *refusals.ALWAYS,
                *refusals.GUARDED,
                *refusals.READ,
                problems.INVALID_CONSULTATION_ID,
                problems.UNKNOWN_EVENT,
            ),
            200,
            {
                records.JSON: {
                    "schema": schemas.ref("OneEvent"),
                    "example": {"consultation_id": "c-1", **schemas.STORED},
                }
            },
            ("consultation", "message_id"),
        ),
        Operation(
            "GET",
            "/consultations",
            "listConsultations",
            "List consultations",
            "Those of which something is in HDF5, sorted by their bytes; a token with a prefix sees its own.",
            Scope.READ,
            (*refusals.ALWAYS, *refusals.GUARDED, *refusals.READ, *refusals.PAGED),
            200,
            {
                records.JSON: {
                    "schema": schemas.ref("ConsultationPage"),
                    "example": {"consultations": [{"consultation_id": "c-1"}], "next": None},
                },
                records.NDJSON: lines,
            },
            ("prefix", "after_id", "limit"),
            answer_headers=("Link",),
        ),
    ]


def _open() -> list[Operation]:
    about = problems.UNKNOWN_EVENT
    example = {"type": about.type, "title": about.title, "status": about.status, "detail": about.detail}
    return [
        Operation(
            "GET",
            problems.TYPE_PREFIX + "{slug}",
            "getProblem",
            "Look a problem up",
            "What the type of a problem means.",
            None,
            (*refusals.ALWAYS, problems.NOT_FOUND),
            200,
            {records.JSON: {"schema": schemas.ref("Problem"), "example": example}},
            ("slug",),
        ),
        Operation(
            "GET",
            OPENAPI_PATH,
            "getDescription",
            "Get this description",
            "OpenAPI 3.1.",
            None,
            refusals.ALWAYS,
            200,
            {records.JSON: {"schema": {"type": "object", "required": ["openapi", "paths"]}}},
        ),
        Operation(
            "GET",
            DOCS_PATH,
            "getPage",
            "Read this description",
            "The same as a page for people; it loads nothing from elsewhere.",
            None,
            refusals.ALWAYS,
            200,
            {"text/html": {"schema": {"type": "string"}}},
        ),
    ]
