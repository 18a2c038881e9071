"""The synchronous client: the same answers and errors from any thread, in any loop, and a clean end."""

from __future__ import annotations

import gc
import inspect
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from uuid import UUID

import orjson
import pytest

from fiq.client import AsyncClient, Client, ClosedError, EventBody, RefusedError, RetryPolicy
from tests.support.polling import eventually_sync
from tests.support.scripted_http import (
    accepted,
    every_line,
    lost,
    page,
    record,
    refused,
    says,
    sent,
    serving,
    silent,
    stream,
)

EVENT = {"event_type": "A", "payload": "x"}
QUICK = RetryPolicy(deadline=20, attempt_timeout=5, initial_backoff=0.01, max_backoff=0.05)


#: calls that last as long as the service is silent
CALLS = pytest.mark.parametrize(
    "call",
    [lambda client: client.post("c-1", EVENT), lambda client: list(client.follow("c-1"))],
    ids=["post", "follow"],
)


def client_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fiq-client"]


def test_it_has_the_methods_of_the_asynchronous_client() -> None:
    """With the same arguments."""

    def methods(kind: type) -> dict[str, list[str]]:
        found = inspect.getmembers(kind, inspect.isfunction)
        return {
            name: list(inspect.signature(method).parameters)
            for name, method in found
            if not name.startswith("_") or name == "__init__"
        }

    asynchronous = methods(AsyncClient)
    asynchronous["close"] = asynchronous.pop("aclose")
    assert asynchronous == methods(Client)


def test_events_are_posted_and_read_without_a_loop() -> None:
    """One, a batch of a generator, one by its id, pages."""
    document = {"consultation_id": "c-1", **record(7, status="queued")}
    numbered: Iterator[EventBody] = ({"event_type": "A", "n": number} for number in range(1, 1501))
    one = says(200, orjson.dumps(document), "application/json")
    with (
        serving(accepted(7), every_line, every_line, one, page(3, 5, more=True), page(9)) as server,
        Client(server.url) as client,
    ):
        assert 7 == client.post("c-1", EVENT, "k").sequence
        assert list(range(1, 1501)) == [stored.sequence for stored in client.post_batch("c-1", numbered)]
        found = client.event("c-1", UUID(int=7))
        assert [3, 5, 9] == [event.sequence for event in client.read("c-1", 2, page=2)]
    assert found is not None
    assert 7 == found.sequence
    assert [] == client_threads()


def test_it_retries_and_refuses_as_the_asynchronous_client() -> None:
    """The same policy, the same errors."""
    with (
        serving(lost, accepted(), refused(422, "invalid-event")) as server,
        Client(server.url, retry=QUICK) as client,
    ):
        client.post("c-1", EVENT)
        with pytest.raises(RefusedError) as caught:
            client.post("c-1", EVENT)
    assert (1, "/problems/invalid-event") == (client.retries, caught.value.type)


def test_following_is_a_plain_loop_that_ends_with_it() -> None:
    """Leaving the loop lets the connection go; a broken one is replaced."""
    with (
        serving(stream(sent(1), sent(2)), stream(sent(3), open_end=True)) as server,
        Client(server.url, retry=QUICK) as client,
    ):
        found = []
        for event in client.follow("c-1"):
            found.append(event.sequence)
            if event.sequence == 3:
                break
        assert [1, 2, 3] == found
        with pytest.raises(ValueError, match="consultation id"):
            client.follow("a/b")


def test_events_are_chosen_and_all_are_followed_as_asynchronously() -> None:
    """The same arguments ask for the same."""
    since = datetime(2026, 1, 2, tzinfo=UTC)
    of_all = sent(4).replace(b'{"sequence"', b'{"consultation_id":"c-1","sequence"')
    with serving(page(3), page(7), stream(of_all, open_end=True)) as server, Client(server.url) as client:
        assert [3] == [event.sequence for event in client.read("c-1", before=9, type="A", since=since)]
        event = client.event("c-1", key="k")
        assert event is not None
        assert 7 == event.sequence
        assert 4 == next(client.follow_all(2, type="A", since=since)).sequence
    assert [
        "/consultations/c-1/events?type=A&since=2026-01-02T00:00:00Z&before=9&after=0&limit=500",
        "/consultations/c-1/events?key=k&after=0&limit=1",
        "/events?follow=1&after=2&type=A&since=2026-01-02T00:00:00Z",
    ] == [request.path for request in server.seen]


def test_an_error_while_reading_reaches_the_loop_after_the_events_before_it() -> None:
    """None of them is lost."""
    with serving(page(1, 2, more=True), refused(403, "forbidden")) as server, Client(server.url) as client:
        events = client.read("c-1")
        assert [1, 2] == [next(events).sequence, next(events).sequence]
        with pytest.raises(RefusedError):
            next(events)


def test_reading_fetches_only_some_events_ahead() -> None:
    """Memory is bounded however slow the loop is."""
    steps = [page(*range(first, first + 50), more=True) for first in range(1, 1000, 50)]
    with serving(*steps) as server, Client(server.url) as client:
        events = client.read("c-1")
        assert 1 == next(events).sequence
        eventually_sync(lambda: len(server.seen) >= 2)
        assert [*range(2, 11)] == [next(events).sequence for _ in range(9)]
        assert len(server.seen) <= 4
        events.close()


def test_any_number_of_threads_share_one_client() -> None:
    """A web server's, for example."""
    with serving(accepted()) as server, Client(server.url) as client, ThreadPoolExecutor(20) as pool:
        stored = list(pool.map(lambda _: client.post("c-1", EVENT), range(200)))
        assert 1 == len(client_threads())
    assert (200, 200) == (len(stored), len({request.key for request in server.seen}))


async def test_it_works_inside_of_a_running_loop() -> None:
    """In a notebook, or in a handler that is not asynchronous."""
    with serving(accepted(5)) as server, Client(server.url) as client:
        assert 5 == client.post("c-1", EVENT).sequence


def test_a_generator_of_events_may_use_the_client_itself() -> None:
    """It runs in the caller's thread: copying a consultation is one line."""
    with serving(page(1, 2, 3), every_line) as server, Client(server.url) as client:
        copied: Iterator[EventBody] = (event.event for event in client.read("c-1"))
        assert [1, 2, 3] == [stored.sequence for stored in client.post_batch("c-2", copied)]


@CALLS
def test_ctrl_c_ends_a_call_at_once(call: Callable[[Client], object]) -> None:
    """And the client can still be used."""
    main = threading.main_thread().ident
    assert main == threading.get_ident()
    with serving(silent, accepted(5)) as server, Client(server.url) as client:

        def interrupt() -> None:
            eventually_sync(lambda: server.seen)
            signal.pthread_kill(main, signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            call(client)
        thread.join()
        assert 5 == client.post("c-1", EVENT).sequence


@CALLS
def test_closing_ends_the_calls_of_other_threads(call: Callable[[Client], object]) -> None:
    """They would wait for ever."""
    with serving(silent) as server, ThreadPoolExecutor(1) as pool:
        client = Client(server.url)
        waiting = pool.submit(call, client)
        eventually_sync(lambda: server.seen)
        client.close()
        client.close()
        with pytest.raises(ClosedError):
            waiting.result(timeout=10)
        with pytest.raises(ClosedError):
            client.post("c-1", EVENT)
        assert [] == client_threads()


def test_a_client_that_is_forgotten_ends_its_thread() -> None:
    """As a file is closed."""
    with serving(accepted()) as server:
        client = Client(server.url)
        client.post("c-1", EVENT)
        assert 1 == len(client_threads())
        del client
        gc.collect()
        eventually_sync(lambda: not client_threads())


def test_a_program_may_end_without_closing_its_client() -> None:
    """Neither a warning nor a thread keeps it."""
    script = (
        "import sys; from fiq import Client; client = Client(sys.argv[1]); "
        "client.post('c-1', {'event_type': 'A'}); events = client.follow('c-1'); next(events)"
    )
    with serving(accepted(), stream(sent(1), open_end=True)) as server:
        command = [sys.executable, "-W", "always", "-c", script, server.url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (0, "", "") == (done.returncode, done.stdout, done.stderr)


FORKED = """
import os, sys
from fiq import Client
client = Client(sys.argv[1])
assert client.post("c-1", {"event_type": "A"}).sequence == 5
child = os.fork()
assert client.post("c-1", {"event_type": "A"}).sequence == 5
if child:
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert client.post("c-1", {"event_type": "A"}).sequence == 5
client.close()
"""


def test_parent_and_child_go_on_after_a_fork() -> None:
    """As under gunicorn or multiprocessing: the child has connections of its own."""
    with serving(accepted(5)) as server:
        command = [
            sys.executable,
            "-W",
            "ignore::DeprecationWarning",
            "-c",
            FORKED,
            server.url,
        ]  # from 3.12 on of any fork
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ})
    assert (0, "", 4) == (done.returncode, done.stderr, len(server.seen))
