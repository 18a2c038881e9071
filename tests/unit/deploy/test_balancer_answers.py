"""What the balancer says by itself: the same documents as ingest's, so that a client needs to know one form."""

from __future__ import annotations

import re
from pathlib import Path

import orjson
import pytest

from services.ingest.problems import BY_SLUG, CONTENT_TYPE, TYPE_PREFIX

CONFIGURATION = Path(__file__).parents[3] / "deploy" / "nats-cluster" / "balancer" / "haproxy.cfg"
#: an answer: status, content type, body, further headers
ANSWERS = re.findall(
    r"^  http-error status (\d+) content-type (\S+) string '(.+?)'(.*)$", CONFIGURATION.read_text(), re.MULTILINE
)


def test_each_status_that_a_gateway_answers_with_has_a_document() -> None:
    """A request that is broken or late, and an ingest that is away, ends, breaks or does not answer."""
    assert ["400", "408", "500", "502", "503", "504"] == [status for status, *_ in ANSWERS]


@pytest.mark.parametrize(("status", "content_type", "body", "headers"), ANSWERS, ids=[one[0] for one in ANSWERS])
def test_its_document_is_one_of_the_registry(status: str, content_type: str, body: str, headers: str) -> None:
    """Type and title are ingest's, where docs/problems.md says what to do; what time can solve has a Retry-After."""
    document = orjson.loads(body)
    problem = BY_SLUG[document["type"].removeprefix(TYPE_PREFIX)]

    assert CONTENT_TYPE == content_type
    assert {"type", "title", "status", "detail"} == document.keys()
    assert (problem.type, problem.title, int(status)) == (document["type"], document["title"], document["status"])
    assert (" hdr Retry-After 2" if problem.retry else "") == headers
    assert problem.retry == (int(status) in {502, 503, 504})
