"""Every problem that a client can get, as RFC 9457 problem details.

A problem's ``type`` is a promise to clients: it is never renamed, and never used for something else. It is a reference
relative to the service, where ``GET`` on it answers with the entry of this registry; ``docs/problems.md`` has a
paragraph on each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import orjson

from fiq.errors import FiqError

CONTENT_TYPE = "application/problem+json"
#: where the types live
TYPE_PREFIX = "/problems/"


@dataclass(frozen=True, slots=True)
class Problem:
    """One type of problem.

    Attributes:
        slug: last part of the type, and the label of metrics and log lines.
        status: of the HTTP answer.
        title: the same for each occurrence (RFC 9457, section 3.1.3).
        detail: what to do, unless an occurrence knows better.
        retry: the same request may succeed later: the answer has a ``Retry-After``.
        close: the connection is of no further use, its next byte may belong to this request's body.
    """

    slug: str
    status: int
    title: str
    detail: str
    retry: bool = False
    close: bool = False

    @property
    def type(self) -> str:
        """The problem's type, a URI reference."""
        return TYPE_PREFIX + self.slug

    def render(self, detail: str | None = None, members: Mapping[str, object] | None = None) -> bytes:
        """Return the JSON body of an answer, with further *members* (RFC 9457, section 3.2)."""
        document = {
            "type": self.type,
            "title": self.title,
            "status": self.status,
            "detail": self.detail if detail is None else detail,
            **(members or {}),
        }
        return orjson.dumps(document)


class RequestRefusedError(FiqError):
    """Raised when a request is answered with a problem; *detail* and *members* must not quote the request."""

    def __init__(
        self,
        problem: Problem,
        detail: str | None = None,
        members: Mapping[str, object] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(problem.title)
        self.problem = problem
        self.detail = detail
        self.members = members
        self.headers = headers


MALFORMED_REQUEST = Problem(
    "malformed-request", 400, "Malformed request", "The request is not valid HTTP/1.1.", close=True
)
INVALID_IDEMPOTENCY_KEY = Problem(
    "invalid-idempotency-key",
    400,
    "Invalid Idempotency-Key",
    "Send at most one Idempotency-Key header: 1 to 255 visible ASCII characters, quoted or not.",
)
INVALID_JSON = Problem("invalid-json", 400, "Body is not JSON", "The body must be one JSON text in UTF-8.")
INVALID_PARAMETER = Problem(
    "invalid-parameter", 400, "Invalid parameter", "A parameter of the query, or Last-Event-ID, is malformed."
)
UNAUTHORIZED = Problem(
    "unauthorized",
    401,
    "No valid token",
    "Send Authorization: Bearer and a token of this service that has neither ended nor been revoked.",
)
FORBIDDEN = Problem(
    "forbidden", 403, "Not allowed", "The token is not for this: it lacks the scope, or is for other consultations."
)
NOT_FOUND = Problem("not-found", 404, "No such resource", "Nothing is served at this path.")
INVALID_CONSULTATION_ID = Problem(
    "invalid-consultation-id",
    404,
    "Invalid consultation id",
    "A consultation id is 1 to 128 characters of A-Z a-z 0-9 _ -.",
)
UNKNOWN_EVENT = Problem(
    "unknown-event", 404, "Unknown event", "The consultation has no event with this message id, stored or waiting."
)
METHOD_NOT_ALLOWED = Problem(
    "method-not-allowed", 405, "Method not allowed", "The Allow header lists the methods of this resource."
)
NOT_ACCEPTABLE = Problem(
    "not-acceptable",
    406,
    "Not acceptable",
    "This resource comes as application/json or application/x-ndjson, and as text/event-stream with follow=1.",
)
BODY_TIMEOUT = Problem(
    "body-timeout", 408, "Body took too long", "The body was not complete in time; nothing was stored.", close=True
)
HEADER_TIMEOUT = Problem(
    "header-timeout", 408, "Headers took too long", "The request's headers were not complete in time.", close=True
)
DUPLICATE_IN_FLIGHT = Problem(
    "duplicate-in-flight",
    409,
    "Same key in flight",
    "Another request with this Idempotency-Key is being stored just now. Retry with the same key.",
    retry=True,
)
BODY_TOO_LARGE = Problem("body-too-large", 413, "Body too large", "The body is larger than this service takes.")
TOO_MANY_EVENTS = Problem(
    "too-many-events", 413, "Too many events", "A batch holds at most 1,000 events; nothing was stored."
)
UNSUPPORTED_MEDIA_TYPE = Problem(
    "unsupported-media-type",
    415,
    "Unsupported media type",
    "This resource does not take such a Content-Type; JSON must be in UTF-8.",
)
UNSUPPORTED_CONTENT_ENCODING = Problem(
    "unsupported-content-encoding",
    415,
    "Unsupported content encoding",
    "Send the body as it is, without Content-Encoding.",
)
EXPECTATION_FAILED = Problem(
    "expectation-failed", 417, "Expectation failed", "The only expectation that is met is 100-continue."
)
INVALID_EVENT = Problem(
    "invalid-event", 422, "Body is not an event", "An event is a JSON object with a non-empty string event_type."
)
INVALID_BATCH = Problem(
    "invalid-batch",
    422,
    "Batch holds lines that are no events",
    "Nothing was stored; each member of lines says what is wrong with its line.",
)
IDEMPOTENCY_KEY_REUSED = Problem(
    "idempotency-key-reused",
    422,
    "Key of another event",
    "An event with another body was stored under this key before, and is kept. Send this one under a key of its own.",
)
TOO_MANY_IN_FLIGHT = Problem(
    "too-many-in-flight",
    429,
    "Too many requests in flight",
    "This process stores as many events at once as it may; nothing was stored. Retry with the same key.",
    retry=True,
)
RATE_LIMITED = Problem(
    "rate-limited",
    429,
    "Over the rate",
    "The token has sent more than its rate allows; nothing was stored. Retry with the same key.",
    retry=True,
)
TOO_MANY_FOLLOWERS = Problem(
    "too-many-followers",
    429,
    "Too many followers",
    "As many clients follow consultations through this process as may.",
    retry=True,
)
INTERNAL_ERROR = Problem(
    "internal-error",
    500,
    "Internal error",
    "A fault of the service. The event may or may not be stored: retry with the same Idempotency-Key.",
)
TOO_MANY_CONNECTIONS = Problem(
    "too-many-connections",
    503,
    "Too many connections",
    "This process has as many connections as it may; nothing was stored. Retry with the same key.",
    retry=True,
    close=True,
)
BACKLOG_FULL = Problem(
    "backlog-full",
    503,
    "Too much waits",
    "More events wait to be written than may; nothing was stored. Retry with the same key.",
    retry=True,
)
LOG_FULL = Problem(
    "log-full",
    503,
    "Event log is full",
    "The event log takes no more until it is drained; nothing was stored. Retry with the same key.",
    retry=True,
)
LOG_UNAVAILABLE = Problem(
    "log-unavailable",
    503,
    "Event log is unavailable",
    "No quorum answered in time. The event may or may not be stored: retry with the same Idempotency-Key.",
    retry=True,
)
KEY_NOT_COMPARED = Problem(
    "key-not-compared",
    503,
    "Key cannot be compared now",
    "An event is stored under this key, and nothing that can show its body answers. Retry with the same key.",
    retry=True,
)
LOG_REFUSED = Problem(
    "log-refused",
    503,
    "Event log refuses",
    "The event log refuses until an operator has acted; nothing was stored. Retry with the same key.",
    retry=True,
)
CORPUS_AWAY = Problem(
    "corpus-away",
    503,
    "Corpus is away",
    "No persister answers for this part of the corpus just now, and the event log alone does not hold all of it.",
    retry=True,
)


def registry() -> tuple[Problem, ...]:
    """Return every problem of this module, ordered as written."""
    return tuple(value for value in globals().values() if isinstance(value, Problem))


BY_SLUG: Mapping[str, Problem] = {problem.slug: problem for problem in registry()}

_BY_HTTP_STATUS = {
    problem.status: problem for problem in (NOT_FOUND, METHOD_NOT_ALLOWED, BODY_TOO_LARGE, EXPECTATION_FAILED)
}


def of_status(status: int) -> Problem:
    """Return the problem that stands for an error which aiohttp itself answers with *status*."""
    return _BY_HTTP_STATUS.get(status, MALFORMED_REQUEST if status < 500 else INTERNAL_ERROR)
