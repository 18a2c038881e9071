"""Posting: when a client tries again, how long it waits, and what it says when it ends."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from uuid import UUID

import orjson
import pytest
from yarl import URL

from fiq.client import (
    AsyncClient,
    Client,
    ClientError,
    ClosedError,
    EventBody,
    GaveUpError,
    InvalidArgumentError,
    RefusedError,
    RetryPolicy,
    UnexpectedAnswerError,
)
from tests.support.polling import eventually
from tests.support.scripted_http import (
    Step,
    accepted,
    accepted_batch,
    cut,
    lost,
    refused,
    result,
    says,
    scripted,
    silent,
)

EVENT = {"event_type": "A", "payload": "secret-payload"}
#: quick pauses; the deadline is far away
QUICK = RetryPolicy(deadline=20, attempt_timeout=5, initial_backoff=0.01, max_backoff=0.05)
#: gives up at once
SHORT = RetryPolicy(deadline=0.8, attempt_timeout=0.25, initial_backoff=0.01, max_backoff=0.05)


def twice(status: int, slug: str) -> list[Step]:
    """Refuse an event twice, the second time for longer than the deadline."""
    return [refused(status, slug), refused(status, slug, retry_after="3600")]


def free_url() -> str:
    """Return the URL of a free port."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return f"http://127.0.0.1:{sock.getsockname()[1]}"


async def test_an_event_is_posted_as_the_contract_says() -> None:
    """Path, media type, token, and a key that is a new UUIDv7."""
    async with scripted(accepted(7)) as server, AsyncClient(server.url, "t0ken") as client:
        stored = await client.post("c-1", EVENT)
    (request,) = server.seen
    assert ("POST", "/consultations/c-1/events") == (request.method, request.path)
    assert ("application/json", "Bearer t0ken") == (request.headers["Content-Type"], request.headers["Authorization"])
    assert (7, str(UUID(request.key))) == (UUID(request.key).version, request.key)
    assert EVENT == orjson.loads(request.body)
    assert (7, UUID(int=7), "c-1", False) == (stored.sequence, stored.message_id, stored.consultation, stored.duplicate)


async def test_json_text_is_posted_byte_for_byte() -> None:
    """Numbers keep their digits, members their order."""
    body = b'{"event_type":"A", "payload": 1.10}'
    async with scripted(accepted()) as server, AsyncClient(server.url) as client:
        await client.post("c-1", body, "visit-17:line-3")
    assert (body, "visit-17:line-3") == (server.seen[0].body, server.seen[0].key)


@pytest.mark.parametrize(
    "failure",
    [
        lost,
        cut(202, b'{"status":'),
        refused(408, "body-timeout"),
        refused(409, "duplicate-in-flight", retry_after="0"),
        refused(429, "too-many-in-flight"),
        refused(503, "log-unavailable"),
        says(502, b"Bad Gateway"),
        says(504, b"Gateway Timeout"),
    ],
    ids=["lost", "cut in the answer", "408", "409", "429", "503", "502", "504"],
)
async def test_what_may_pass_is_tried_again_under_the_same_key(failure: Step) -> None:
    """Each try has the key that the client made for the first: whatever became of that, one event is stored."""
    async with (
        scripted(failure, failure, accepted(duplicate=True)) as server,
        AsyncClient(server.url, retry=QUICK) as client,
    ):
        stored = await client.post("c-1", EVENT)
        assert (True, 2) == (stored.duplicate, client.retries)
    assert 3 == len(server.seen)
    assert 1 == len({(request.key, request.body) for request in server.seen})


async def test_retries_are_logged_without_the_event(caplog: pytest.LogCaptureFixture) -> None:
    """A program that waits for a wrong port shows why, if it logs at INFO."""
    caplog.set_level("INFO", "fiq.client")
    async with (
        scripted(refused(503, "backlog-full"), accepted()) as server,
        AsyncClient(server.url, retry=QUICK) as client,
    ):
        await client.post("c-1", {"event_type": "SECRET"}, "secret-key")
    with pytest.raises(GaveUpError):
        async with AsyncClient("http://127.0.0.1:9", retry=RetryPolicy(deadline=0.5)) as client:
            await client.post("c-1", {"event_type": "SECRET"}, "secret-key")
    first, second, *_ = messages = [record.getMessage() for record in caplog.records if record.name == "fiq.client"]
    assert re.fullmatch(r"503 .*; trying again in \d\.\d s", first)
    assert re.fullmatch(r"no answer from http://127\.0\.0\.1:9: .*; trying again in 0\.\d s", second)
    assert not [one for one in messages if "secret" in one.lower()]


async def test_a_try_without_an_answer_is_given_up_for_another() -> None:
    """A service that hangs does not hold the client for the whole deadline."""
    retry = RetryPolicy(deadline=20, attempt_timeout=0.2, initial_backoff=0.01)
    async with scripted(silent, accepted()) as server, AsyncClient(server.url, retry=retry) as client:
        assert 1 == (await client.post("c-1", EVENT)).sequence


@pytest.mark.parametrize("form", ["seconds", "date"])
async def test_no_retry_comes_sooner_than_retry_after(form: str) -> None:
    """RFC 9110, section 10.2.3, has two forms; the pauses of the client's own are far shorter here."""
    if form == "seconds":
        least, value = 1.0, "1"
    else:  # whole seconds: what is left of 2 is between 1 and 2
        least, value = 1.0, format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    async with (
        scripted(refused(503, "backlog-full", retry_after=value), accepted()) as server,
        AsyncClient(server.url, retry=QUICK) as client,
    ):
        await client.post("c-1", EVENT)
    first, second = server.seen
    assert least <= second.at - first.at < 5


async def test_a_retry_after_beyond_the_deadline_ends_the_call_at_once() -> None:
    """A wait until the deadline would be in vain."""
    started = time.monotonic()
    async with scripted(refused(429, "rate-limited", retry_after="3600")) as server, AsyncClient(server.url) as client:
        with pytest.raises(GaveUpError) as caught:
            await client.post("c-1", EVENT)
    assert time.monotonic() - started < 10
    assert ("/problems/rate-limited", 429, "About rate-limited.") == (
        caught.value.type,
        caught.value.status,
        caught.value.detail,
    )
    assert 1 == len(server.seen)


@pytest.mark.parametrize(
    ("failures", "may_be_stored"),
    [
        ([lost], True),
        ([silent], True),
        ([refused(409, "duplicate-in-flight")], True),
        (twice(429, "too-many-in-flight"), False),
        (twice(503, "too-many-connections"), False),
        (twice(503, "log-full"), False),
        (twice(503, "backlog-full"), False),
        (twice(503, "log-refused"), False),
        ([refused(503, "log-unavailable")], True),
        ([says(503, b"no server is available")], True),
    ],
    ids=["lost", "silent", "409", "429", "connections", "full", "backlog", "refused", "unavailable", "a proxy"],
)
async def test_at_the_deadline_the_error_says_whether_the_event_may_be_stored(
    failures: Sequence[Step], may_be_stored: bool
) -> None:
    """A program that throws the event away then knows what it risks."""
    # a try that is cut off by the deadline may have stored it, whatever was said before
    retry = SHORT if may_be_stored else QUICK
    async with scripted(*failures) as server, AsyncClient(server.url, retry=retry) as client:
        with pytest.raises(GaveUpError) as caught:
            await client.post("c-1", EVENT)
    assert may_be_stored is caught.value.may_be_stored
    assert len(server.seen) > 1
    assert "secret-payload" not in f"{caught.value!s}{caught.value!r}{caught.value.__dict__}"


async def test_one_try_that_may_have_stored_it_is_enough() -> None:
    """The last answer alone would say that nothing is stored."""
    async with (
        scripted(lost, refused(429, "too-many-in-flight", retry_after="3600")) as server,
        AsyncClient(server.url) as client,
    ):
        with pytest.raises(GaveUpError) as caught:
            await client.post("c-1", EVENT)
    assert (True, 429) == (caught.value.may_be_stored, caught.value.status)


async def test_a_service_that_is_not_there_has_stored_nothing() -> None:
    """And the error names where it was looked for."""
    url = free_url()
    async with AsyncClient(url, retry=SHORT) as client:
        with pytest.raises(GaveUpError, match=url) as caught:
            await client.post("c-1", EVENT)
    assert (False, None, None) == (caught.value.may_be_stored, caught.value.status, caught.value.detail)


@pytest.mark.parametrize(
    ("scheme", "host", "step", "why"),
    [
        ("http", "", None, "Connection refused"),
        ("http", "nowhere.invalid", None, "the host name cannot be resolved"),
        ("https", "", lost, "the TLS handshake failed"),
        ("http", "", lost, "the connection was lost"),
        ("http", "", silent, "timeout"),
    ],
)
async def test_an_error_says_why_there_was_no_answer(
    scheme: str, host: str, step: Step | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong port, a wrong name and a wrong scheme are mended in different places."""

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "as a name server says it, sooner or later")

    if host:
        monkeypatch.setattr(socket, "getaddrinfo", unknown)
    async with scripted(step or lost) as server:
        url = free_url() if step is None else server.url
        place = URL(url).with_scheme(scheme)
        place = place.with_host(host) if host else place
        async with AsyncClient(str(place), retry=RetryPolicy(deadline=4, attempt_timeout=2)) as client:
            with pytest.raises(GaveUpError, match=f"no answer from {place.origin()}: {why}"):
                await client.post("c-1", EVENT)


async def test_a_refusal_without_a_problem_document_is_not_from_fiq() -> None:
    """As by another service on that port."""
    async with scripted(says(404, b"404 page not found", "text/plain")) as server, AsyncClient(server.url) as client:
        with pytest.raises(UnexpectedAnswerError, match=f"{server.url} answers 404 without a problem document"):
            await client.post("c-1", EVENT)


@pytest.mark.parametrize(
    ("status", "slug"),
    [(400, "invalid-json"), (401, "unauthorized"), (403, "forbidden"), (413, "body-too-large"), (422, "invalid-event")],
)
async def test_a_refusal_is_final(status: int, slug: str) -> None:
    """One try; the error carries the problem."""
    async with scripted(refused(status, slug)) as server, AsyncClient(server.url, retry=QUICK) as client:
        with pytest.raises(RefusedError, match=f"About {slug}") as caught:
            await client.post("c-1", EVENT)
    assert (f"/problems/{slug}", status, False) == (caught.value.type, caught.value.status, caught.value.may_be_stored)
    assert 1 == len(server.seen)


async def test_a_fault_of_the_service_is_shown_and_the_event_may_be_stored() -> None:
    """500 is not tried again by itself: it would hide the fault."""
    async with scripted(refused(500, "internal-error")) as server, AsyncClient(server.url, retry=QUICK) as client:
        with pytest.raises(RefusedError) as caught:
            await client.post("c-1", EVENT)
    assert (True, 1) == (caught.value.may_be_stored, len(server.seen))


async def test_a_redirection_is_not_followed() -> None:
    """Neither the token nor the event goes to where another server points."""
    async with (
        scripted(accepted()) as elsewhere,
        scripted(says(307, b"", Location=elsewhere.url)) as server,
        AsyncClient(server.url, "t0ken", retry=QUICK) as client,
    ):
        with pytest.raises(UnexpectedAnswerError):
            await client.post("c-1", EVENT)
    assert [] == elsewhere.seen


@pytest.mark.parametrize("body", [b"", b"hello", b"[]", b'{"status":"accepted"}', b'{"sequence":"1"}'])
async def test_a_202_that_says_nothing_is_not_believed(body: bytes) -> None:
    """Something that is not fiq answered."""
    async with scripted(says(202, body)) as server, AsyncClient(server.url) as client:
        with pytest.raises(UnexpectedAnswerError) as caught:
            await client.post("c-1", EVENT)
    assert caught.value.may_be_stored


async def test_a_problem_document_that_is_none_leaves_the_status() -> None:
    """What a proxy says in its place is never quoted."""
    async with (
        scripted(says(400, b'{"type": 1', "application/problem+json")) as server,
        AsyncClient(server.url) as client,
    ):
        with pytest.raises(UnexpectedAnswerError, match="answers 400") as caught:
            await client.post("c-1", EVENT)
    assert "about:blank" == caught.value.type


@pytest.mark.parametrize(("consultation", "key"), [("a/b", None), ("", None), ("c-1", "two words"), ("c-1", "x" * 256)])
async def test_malformed_ids_are_never_sent(consultation: str, key: str | None) -> None:
    """They would be another path, or another header."""
    async with scripted(accepted()) as server, AsyncClient(server.url) as client:
        with pytest.raises(InvalidArgumentError):
            await client.post(consultation, EVENT, key)
    assert [] == server.seen


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:7001", "ftp://x", "http://", "http://[x", "http://a..b", "http://me:word@x", "http://x?y=1"]
)
def test_a_malformed_url_is_refused_at_once(url: str) -> None:
    """Not at the first post."""
    with pytest.raises(InvalidArgumentError, match="URL"):
        AsyncClient(url)


@pytest.mark.parametrize("token", ["", "two words", "line\nbreak", "ü"])
def test_a_malformed_token_is_refused_and_not_shown(token: str) -> None:
    """It is a secret all the same."""
    with pytest.raises(InvalidArgumentError) as caught:
        AsyncClient("http://x", token)
    assert not token or token not in str(caught.value)


async def test_a_batch_is_one_request_of_lines() -> None:
    """Each line has a key of its own by its number; JSON text stays as it is but for line breaks."""
    events: list[EventBody] = [b'{"event_type":\n"A"}', {"event_type": "B", "event_id": "mine"}]
    async with (
        scripted(accepted_batch(result("c-1", 4), result("c-1", 3, duplicate=True))) as server,
        AsyncClient(server.url) as client,
    ):
        stored = await client.post_batch("c-1", events, "file-1")
    (request,) = server.seen
    assert ("/consultations/c-1/events/batch", "application/x-ndjson", "file-1") == (
        request.path,
        request.headers["Content-Type"],
        request.key,
    )
    assert b'{"event_type": "A"}\n{"event_type":"B","event_id":"mine"}' == request.body
    assert [(4, False), (3, True)] == [(one.sequence, one.duplicate) for one in stored]


async def test_a_part_of_a_batch_keeps_the_numbers_of_its_lines() -> None:
    """Empty lines stand for those that are left out."""
    async with (
        scripted(accepted_batch(result("c-1", 4), result("c-2", 5))) as server,
        AsyncClient(server.url) as client,
    ):
        await client.post_batch(None, [b'{"n":2}', b'{"n":5}'], "file-1", numbers=[2, 5])
        with pytest.raises(ValueError, match="ascend"):
            await client.post_batch(None, [b"{}", b"{}"], "file-1", numbers=[2, 2])
    assert ("/events/batch", b'\n{"n":2}\n\n\n{"n":5}') == (server.seen[0].path, server.seen[0].body)


async def test_an_empty_batch_is_no_request() -> None:
    """There is nothing to ask."""
    async with scripted(accepted()) as server, AsyncClient(server.url) as client:
        assert [] == await client.post_batch("c-1", [])
    assert [] == server.seen


async def test_a_refused_batch_names_its_lines() -> None:
    """By number, with the reason; nothing is stored."""
    lines = [{"line": 2, "reason": "event_type is required"}]
    async with scripted(refused(422, "invalid-batch", lines=lines)) as server, AsyncClient(server.url) as client:
        with pytest.raises(RefusedError) as caught:
            await client.post_batch("c-1", [EVENT, {"no": "type"}])
    assert caught.value.problem is not None
    assert [(2, "event_type is required")] == [(line.number, line.reason) for line in caught.value.problem.lines]
    assert not caught.value.may_be_stored


@pytest.mark.parametrize(
    ("status", "slug", "may_be_stored"),
    [
        (422, "idempotency-key-reused", True),
        (413, "too-many-events", False),
        (503, "log-full", True),
        (429, "rate-limited", False),
    ],
)
async def test_of_a_batch_some_events_may_be_stored(status: int, slug: str, may_be_stored: bool) -> None:
    """Where a single one would be known not to be."""
    async with scripted(refused(status, slug, retry_after="3600")) as server, AsyncClient(server.url) as client:
        with pytest.raises((RefusedError, GaveUpError)) as caught:
            await client.post_batch("c-1", [EVENT, EVENT])
    assert may_be_stored is caught.value.may_be_stored


async def test_an_answer_for_fewer_lines_than_were_sent_is_not_believed() -> None:
    """Which of them would be accepted?"""
    async with scripted(accepted_batch(result("c-1", 4))) as server, AsyncClient(server.url) as client:
        with pytest.raises(UnexpectedAnswerError):
            await client.post_batch("c-1", [EVENT, EVENT])


async def test_many_tasks_share_one_client() -> None:
    """Each call has its own tries."""
    async with (
        scripted(lost, refused(503, "log-full"), accepted()) as server,
        AsyncClient(server.url, retry=QUICK) as client,
    ):
        stored = await asyncio.gather(*(client.post("c-1", EVENT) for _ in range(30)))
    assert (30, 32) == (len(stored), len(server.seen))


async def test_a_client_opens_by_itself_and_is_closed_once() -> None:
    """A program may keep one for ever, or close it without a context manager."""
    async with scripted(accepted()) as server:
        client = AsyncClient(server.url)
        assert 1 == (await client.post("c-1", EVENT)).sequence
        await client.aclose()
        await client.aclose()
        with pytest.raises(ClosedError):
            await client.post("c-1", EVENT)
    assert 1 == len(server.seen)


async def test_closing_ends_the_calls_that_are_under_way() -> None:
    """None of them retries with connections that do not exist any more."""
    async with scripted(silent) as server:
        client = AsyncClient(server.url)
        post = asyncio.create_task(client.post("c-1", EVENT))
        await eventually(lambda: server.seen)
        await client.aclose()
        with pytest.raises(ClosedError) as caught:
            await post
    assert (True, 1) == (caught.value.may_be_stored, len(server.seen))


@pytest.mark.parametrize(
    "call",
    [
        lambda: AsyncClient("nowhere"),
        lambda: AsyncClient("http://x", "two words"),
        lambda: Client("nowhere"),
        lambda: asyncio.run(AsyncClient("http://x").post("a/b", EVENT)),
        lambda: asyncio.run(AsyncClient("http://x").post("a", EVENT, "two words")),
        lambda: asyncio.run(AsyncClient("http://x").post("a", {"n": {1, 2}})),
        lambda: asyncio.run(AsyncClient("http://x").post_batch("a", [EVENT], "two words")),
        lambda: asyncio.run(AsyncClient("http://x").post_batch("a/b", [EVENT])),
        lambda: asyncio.run(AsyncClient("http://x").event("a", "no uuid")),
        lambda: AsyncClient("http://x").read("a/b"),
        lambda: AsyncClient("http://x").read("a", page=0),
        lambda: AsyncClient("http://x").read("a", page=1001),
        lambda: AsyncClient("http://x").follow("a/b"),
    ],
)
def test_a_malformed_argument_is_an_error_of_the_client_and_a_value_error(call: Callable[[], object]) -> None:
    """One `except ClientError` around a call is enough."""
    with pytest.raises(ClientError) as caught:
        call()
    assert isinstance(caught.value, InvalidArgumentError)
    assert isinstance(caught.value, ValueError)
    assert not caught.value.may_be_stored
