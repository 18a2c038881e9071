"""Every problem that a client can get, as RFC 9457 problem details, and the answers that hold them.

A problem's ``type`` is a promise to clients: it is never renamed or used for something else. It is a URI relative to
the service; ``GET`` on it returns the problem's entry here. ``docs/problems.md`` has a paragraph on each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import orjson
from aiohttp import web
from multidict import CIMultiDict
from prometheus_client import Counter, Histogram

from fiq.errors import FiqError
from services.core.logs import LogThrottle, get_logger
from services.core.tracing import trace_of

CONTENT_TYPE = "application/problem+json"
#: path of the types
TYPE_PREFIX = "/problems/"
#: the Server header, which does not tell library and version
SERVER = "fiq"
#: decimals of seconds in log lines: microseconds
SECONDS_DECIMALS = 6


@dataclass(frozen=True, slots=True)
class ProblemType:
    """One type of problem.

    Attributes:
        slug: last part of the type; also the label in metrics and log lines.
        status: of the HTTP answer.
        title: the same for each occurrence (RFC 9457, section 3.1.3).
        detail: what to do, unless an occurrence has a detail of its own.
        retry: the same request may succeed later: the answer has a ``Retry-After``.
        close: close the connection: its next byte may belong to this request's body.
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

    def document(self) -> dict[str, object]:
        """Return its entry: type, title, status, and what to do."""
        return {"type": self.type, "title": self.title, "status": self.status, "detail": self.detail}

    def render(self, detail: str | None = None, members: Mapping[str, object] | None = None) -> bytes:
        """Return the JSON body of an answer, with further *members* (RFC 9457, section 3.2)."""
        own = {} if detail is None else {"detail": detail}
        return orjson.dumps(self.document() | own | dict(members or {}))


class RequestRefusedError(FiqError):
    """Raised when a request is answered with a problem; *detail* and *members* must not quote the request.

    Args:
        problem: the answer.
        detail: replaces the problem's own.
        members: further members of the document.
        headers: further headers.
    """

    def __init__(
        self,
        problem: ProblemType,
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


MALFORMED_REQUEST = ProblemType(
    "malformed-request", 400, "Malformed request", "The request is not valid HTTP/1.1.", close=True
)
INVALID_IDEMPOTENCY_KEY = ProblemType(
    "invalid-idempotency-key",
    400,
    "Invalid Idempotency-Key",
    "Send at most one Idempotency-Key header: 1 to 255 visible ASCII characters, quoted or not.",
)
INVALID_JSON = ProblemType("invalid-json", 400, "Invalid JSON", "The body must be one JSON text in UTF-8.")
INVALID_PARAMETER = ProblemType(
    "invalid-parameter", 400, "Invalid parameter", "A query parameter, or Last-Event-ID, is malformed."
)
UNAUTHORIZED = ProblemType(
    "unauthorized",
    401,
    "Invalid or missing token",
    "Send Authorization: Bearer with a token of this service that is neither expired nor revoked.",
)
FORBIDDEN = ProblemType(
    "forbidden",
    403,
    "Token not sufficient",
    "The token lacks the scope, or is for consultations with another prefix.",
)
NOT_FOUND = ProblemType("not-found", 404, "Unknown path", "There is no resource at this path: GET / lists all.")
INVALID_CONSULTATION_ID = ProblemType(
    "invalid-consultation-id",
    404,
    "Invalid consultation id",
    "A consultation id is 1 to 128 characters of A-Z a-z 0-9 _ -.",
)
UNKNOWN_EVENT = ProblemType(
    "unknown-event", 404, "Unknown event", "The consultation has no event with this message id."
)
UNKNOWN_DEAD_LETTER = ProblemType(
    "unknown-dead-letter",
    404,
    "Unknown dead letter",
    "There is no dead letter with this sequence: it was requeued or dropped, or never was one.",
)
METHOD_NOT_ALLOWED = ProblemType(
    "method-not-allowed", 405, "Method not allowed", "The Allow header lists the methods of this resource."
)
NOT_ACCEPTABLE = ProblemType(
    "not-acceptable",
    406,
    "Not acceptable",
    "Accept application/json, application/x-ndjson or CloudEvents; with follow=1, text/event-stream.",
)
BODY_TIMEOUT = ProblemType(
    "body-timeout", 408, "Body timeout", "The body did not arrive in time; nothing was stored.", close=True
)
HEADER_TIMEOUT = ProblemType(
    "header-timeout", 408, "Header timeout", "The request's headers did not arrive in time.", close=True
)
POSITION_GONE = ProblemType(
    "position-gone",
    410,
    "Position gone",
    "The log no longer holds all events after this position. Read the consultations, and follow without after.",
)
DUPLICATE_IN_FLIGHT = ProblemType(
    "duplicate-in-flight",
    409,
    "Duplicate in flight",
    "Another request with this Idempotency-Key is being stored. Retry with the same key.",
    retry=True,
)
REQUEUE_TOO_EARLY = ProblemType(
    "requeue-too-early",
    409,
    "Requeue too early",
    "The log still knows the message under its id, and would drop it. Try again after Retry-After.",
    retry=True,
)
BODY_TOO_LARGE = ProblemType("body-too-large", 413, "Body too large", "The body is larger than this service accepts.")
TOO_MANY_EVENTS = ProblemType(
    "too-many-events", 413, "Too many events", "A batch holds at most 1,000 events; nothing was stored."
)
UNSUPPORTED_MEDIA_TYPE = ProblemType(
    "unsupported-media-type",
    415,
    "Unsupported media type",
    "This resource does not accept this Content-Type; JSON must be in UTF-8.",
)
UNSUPPORTED_CONTENT_ENCODING = ProblemType(
    "unsupported-content-encoding",
    415,
    "Unsupported content encoding",
    "Send the body without Content-Encoding.",
)
EXPECTATION_FAILED = ProblemType(
    "expectation-failed", 417, "Expectation failed", "Only Expect: 100-continue is supported."
)
CROSS_ORIGIN = ProblemType(
    "cross-origin",
    403,
    "Cross-origin request",
    "While this service needs no token, a page of another origin must not change anything. Use the service's own page, "
    "or let the service require tokens.",
)
UNKNOWN_HOST = ProblemType(
    "unknown-host",
    421,
    "Unknown host",
    "While this service needs no token, it answers requests to localhost, 127.0.0.1 and [::1] only, so that web pages "
    "cannot read it. Use such an address; or let the service require tokens, or list its name in FI_ALLOWED_HOSTS.",
)
INVALID_EVENT = ProblemType(
    "invalid-event", 422, "Invalid event", "An event is a JSON object with a non-empty string event_type."
)
INVALID_ACTION = ProblemType(
    "invalid-action",
    422,
    "Invalid action",
    'Send a JSON object with reason, a text of at most 500 characters: {"reason": "…"}. To drop a dead letter, the '
    "reason must not be empty or blank.",
)
NOT_REQUEUEABLE = ProblemType(
    "not-requeueable",
    422,
    "Dead letter not requeueable",
    "The message of this dead letter cannot go back into the log: correct it and post it under a new key, or drop it.",
)
INVALID_BATCH = ProblemType(
    "invalid-batch",
    422,
    "Invalid batch",
    "Nothing was stored; each entry of lines says what is wrong with its line.",
)
IDEMPOTENCY_KEY_REUSED = ProblemType(
    "idempotency-key-reused",
    422,
    "Idempotency-Key reused",
    "An event with another body is stored under this key, and is kept. Send this one under a new key.",
)
TOO_MANY_IN_FLIGHT = ProblemType(
    "too-many-in-flight",
    429,
    "Too many requests in flight",
    "This process has reached its limit of requests in flight; nothing was stored. Retry with the same key.",
    retry=True,
)
RATE_LIMITED = ProblemType(
    "rate-limited",
    429,
    "Rate limit exceeded",
    "The token has exceeded its rate; nothing was stored. Retry with the same key.",
    retry=True,
)
TOO_MANY_NEW_CONSULTATIONS = ProblemType(
    "too-many-new-consultations",
    429,
    "Too many new consultations",
    "The token has begun too many consultations; nothing was stored. Known consultations are not affected. Retry with "
    "the same key.",
    retry=True,
)
TOO_MANY_FOLLOWERS = ProblemType(
    "too-many-followers",
    429,
    "Too many followers",
    "This process has reached its limit of followers.",
    retry=True,
)
HEADERS_TOO_LARGE = ProblemType(
    "headers-too-large",
    431,
    "Headers too large",
    "The request line and all headers together may have 16 KiB. Send fewer or shorter ones.",
    close=True,
)
INTERNAL_ERROR = ProblemType(
    "internal-error",
    500,
    "Internal error",
    "The service failed. The event may or may not be stored: retry with the same Idempotency-Key.",
)
NO_FEED = ProblemType(
    "no-feed",
    501,
    "No feed of all consultations",
    "This log has no order over all consultations: follow them one by one. NATS JetStream (FI_LOG_URL) has one.",
)
TOO_MANY_CONNECTIONS = ProblemType(
    "too-many-connections",
    503,
    "Too many connections",
    "This process has reached its limit of connections; nothing was stored. Retry with the same key.",
    retry=True,
    close=True,
)
BACKLOG_FULL = ProblemType(
    "backlog-full",
    503,
    "Backlog full",
    "Too many events are waiting to be persisted; nothing was stored. Retry with the same key.",
    retry=True,
)
WINDOW_FULL = ProblemType(
    "window-full",
    503,
    "Duplicate window full",
    "The log has stored as many events lately as its nodes can remember; nothing was stored. Retry with the same key.",
    retry=True,
)
LOG_FULL = ProblemType(
    "log-full",
    503,
    "Event log full",
    "The event log accepts no events until it is drained; nothing was stored. Retry with the same key.",
    retry=True,
)
LOG_UNAVAILABLE = ProblemType(
    "log-unavailable",
    503,
    "Event log unavailable",
    "No quorum answered in time. The event may or may not be stored: retry with the same Idempotency-Key.",
    retry=True,
)
KEY_NOT_COMPARED = ProblemType(
    "key-not-compared",
    503,
    "Idempotency-Key not comparable",
    "An event is stored under this key, but its stored body cannot be read right now. Retry with the same key.",
    retry=True,
)
LOG_REFUSED = ProblemType(
    "log-refused",
    503,
    "Event log refused",
    "The event log refuses events until an operator acts; nothing was stored. Retry with the same key.",
    retry=True,
)
CORPUS_AWAY = ProblemType(
    "corpus-away",
    503,
    "Corpus unavailable",
    "No persister answers for this part of the corpus, and the event log does not hold all of it. Retry later.",
    retry=True,
)


def registry() -> tuple[ProblemType, ...]:
    """Return every problem of this module, ordered as written."""
    return tuple(value for value in globals().values() if isinstance(value, ProblemType))


BY_SLUG: Mapping[str, ProblemType] = {problem.slug: problem for problem in registry()}

_BY_HTTP_STATUS = {
    problem.status: problem for problem in (NOT_FOUND, METHOD_NOT_ALLOWED, BODY_TOO_LARGE, EXPECTATION_FAILED)
}


def of_status(status: int) -> ProblemType:
    """Return the problem that stands for an error which aiohttp itself answers with *status*."""
    return _BY_HTTP_STATUS.get(status, MALFORMED_REQUEST if status < 500 else INTERNAL_ERROR)


class Refusals:
    """Answers requests with problems; counts and logs each.

    Args:
        counters: by problem.
        durations: of posted events, seconds.
        retry_after: returns the seconds for ``Retry-After``.

    Attributes:
        throttle: of its log lines.
    """

    def __init__(
        self, counters: Mapping[ProblemType, Counter], durations: Histogram, retry_after: Callable[[ProblemType], float]
    ) -> None:
        self._counters = counters
        self._durations = durations
        self._retry_after = retry_after
        self._log = get_logger("ingest").bind()
        self.throttle = LogThrottle()

    def answer(
        self,
        problem: ProblemType,
        detail: str | None = None,
        *,
        members: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
        started: float | None = None,
        consultation: str | None = None,
        request: web.BaseRequest | None = None,
    ) -> web.Response:
        """Return the answer.

        Args:
            problem: what went wrong.
            detail: replaces the problem's own; must not quote the request.
            members: further members of the document; must not quote the request.
            headers: further headers.
            started: when the request came, on :func:`time.perf_counter`; None if it posted no event.
            consultation: its id, once it is known to be valid.
            request: whose trace is logged, once it is parsed.
        """
        self._counters[problem].inc()
        values: dict[str, object] = {"status": problem.status, "problem": problem.slug}
        if started is not None:
            duration = time.perf_counter() - started
            self._durations.observe(duration)
            values["duration_s"] = round(duration, SECONDS_DECIMALS)
        if consultation is not None:
            values["consultation_id"] = consultation
        if request is not None and (trace := trace_of(request)) is not None:
            values["trace_id"] = trace.trace_id
        allowed = self.throttle.allow(problem.slug)
        if allowed is not None:
            self._log.warning("REQUEST_REFUSED", **values, **allowed)
        all_headers = CIMultiDict({"Content-Type": CONTENT_TYPE, "Server": SERVER})
        if problem.retry:
            all_headers["Retry-After"] = str(math.ceil(self._retry_after(problem)))
        all_headers.update(headers or {})
        response = web.Response(status=problem.status, body=problem.render(detail, members), headers=all_headers)
        if problem.close:
            response.force_close()
        return response

    def answer_error(
        self,
        error: RequestRefusedError,
        request: web.BaseRequest,
        *,
        started: float | None = None,
        consultation: str | None = None,
    ) -> web.Response:
        """Return the answer to *request* that *error* asks for; see :meth:`answer`."""
        return self.answer(
            error.problem,
            error.detail,
            members=error.members,
            headers=error.headers,
            started=started,
            consultation=consultation,
            request=request,
        )

    def log_failure(self, error: BaseException) -> None:
        """Log an unexpected *error*: its class and where it arose, never its text, which could quote a body."""
        frames = []
        traceback = error.__traceback__
        while traceback is not None:
            code = traceback.tb_frame.f_code
            frames.append(f"{code.co_filename.rpartition('/')[2]}:{traceback.tb_lineno} {code.co_name}")
            traceback = traceback.tb_next
        self._log.error("REQUEST_FAILED", error=type(error).__name__, frames=frames)

    def log_refused(self, reason: str) -> None:
        """Log why the log refuses: *reason* is its own and says what an operator must change."""
        allowed = self.throttle.allow("LOG_REFUSED")
        if allowed is not None:
            self._log.error("LOG_REFUSED", reason=reason, **allowed)


REFUSALS = web.AppKey("refusals", Refusals)
