"""The problems that operations are refused with, in groups."""

from __future__ import annotations

from services.ingest import problems

#: what every described operation can answer
ALWAYS = (
    problems.MALFORMED_REQUEST,
    problems.HEADER_TIMEOUT,
    problems.EXPECTATION_FAILED,
    problems.INTERNAL_ERROR,
    problems.TOO_MANY_CONNECTIONS,
)
GUARDED = (problems.UNAUTHORIZED, problems.FORBIDDEN, problems.RATE_LIMITED)
#: what any request can meet, one to a path that is not there, too
GENERAL = (
    *ALWAYS,
    problems.UNAUTHORIZED,
    problems.NOT_FOUND,
    problems.METHOD_NOT_ALLOWED,
    problems.RATE_LIMITED,
)
POSTED = (
    problems.INVALID_IDEMPOTENCY_KEY,
    problems.INVALID_JSON,
    problems.BODY_TIMEOUT,
    problems.DUPLICATE_IN_FLIGHT,
    problems.BODY_TOO_LARGE,
    problems.UNSUPPORTED_MEDIA_TYPE,
    problems.UNSUPPORTED_CONTENT_ENCODING,
    problems.IDEMPOTENCY_KEY_REUSED,
    problems.TOO_MANY_IN_FLIGHT,
    problems.BACKLOG_FULL,
    problems.LOG_FULL,
    problems.LOG_UNAVAILABLE,
    problems.KEY_NOT_COMPARED,
    problems.LOG_REFUSED,
)
BATCHED = (problems.TOO_MANY_EVENTS, problems.INVALID_BATCH)
READ = (
    problems.NOT_ACCEPTABLE,
    problems.TOO_MANY_IN_FLIGHT,
    problems.LOG_UNAVAILABLE,
    problems.LOG_REFUSED,
    problems.CORPUS_AWAY,
)
PAGED = (problems.INVALID_PARAMETER,)
