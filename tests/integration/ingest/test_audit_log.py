"""The audit log: who was shown bodies, of which consultation, and how many; never what they say."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from services.core.tokens import Scope, Token, digest_of, render
from tests.support.ingest import Edge, running_edge
from tests.support.polling import eventually

EVENTS = "/consultations/c-1/events"
SECRET = "night-secret"
BEARER = {"Authorization": f"Bearer {SECRET}"}
BODY = b'{"event_type":"T","payload":"very private"}'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(render([Token("night", digest_of(SECRET), frozenset({Scope.READ, Scope.WRITE}))]))
    return path


def shown(entries: Sequence[MutableMapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the audit lines without what each line has."""
    lines = [dict(entry) for entry in entries if entry.get("component") == "audit"]
    return [{key: value for key, value in line.items() if key not in {"component", "log_level"}} for line in lines]


async def post(edge: Edge, count: int) -> str:
    """Post *count* events; return the path of the last one."""
    for _ in range(count):
        reply = await edge.post("c-1", BODY, **BEARER)
    return reply.headers["Location"]


async def test_each_read_that_shows_bodies_is_one_line(file: Path) -> None:
    """Who, from where, which consultation, how many: of a page and of one event; a post shows none."""
    with capture_logs() as entries:
        async with running_edge(token_file=str(file)) as edge:
            path = await post(edge, 3)
            assert [] == shown(entries)
            await edge.request("GET", EVENTS + "?limit=2", headers=BEARER)
            await edge.request("GET", path, headers=BEARER)
    line = {"event": "BODIES_SHOWN", "token": "night", "remote": "127.0.0.1", "consultation_id": "c-1"}
    assert [line | {"events": 2}, line | {"events": 1}] == shown(entries)
    assert "private" not in str(entries)


async def test_an_answer_without_bodies_is_no_line(file: Path) -> None:
    """An empty page, HEAD, what was refused, a list of names, and events without their bodies."""
    with capture_logs() as entries:
        async with running_edge(token_file=str(file)) as edge:
            path = await post(edge, 1)
            await edge.request("GET", EVENTS + "?after=1", headers=BEARER)
            await edge.request("HEAD", EVENTS, headers=BEARER)
            await edge.request("HEAD", path, headers=BEARER)
            await edge.request("GET", EVENTS)
            await edge.request("GET", "/consultations", headers=BEARER)
            await edge.request("GET", EVENTS + "?bodies=0", headers=BEARER)
    assert [] == shown(entries)


async def test_a_follower_is_a_line_when_it_begins_and_one_with_the_number_when_it_ends(file: Path) -> None:
    """However long it follows."""
    with capture_logs() as entries:
        async with running_edge(token_file=str(file), follow_interval=0.01) as edge:
            await post(edge, 2)
            async with edge.client.get(f"{edge.url}{EVENTS}?follow=1", headers=BEARER) as response:
                await post(edge, 1)
                while b"id: 3" not in await response.content.readline():
                    pass
            await eventually(lambda: len(shown(entries)) == 2)
    line = {"event": "BODIES_SHOWN", "token": "night", "remote": "127.0.0.1", "consultation_id": "c-1"}
    assert [line | {"follow": "started", "events": 0}, line | {"follow": "ended", "events": 3}] == shown(entries)


async def test_a_follower_of_all_is_a_line_too(file: Path) -> None:
    """With the number of events that it was shown."""
    with capture_logs() as entries:
        async with running_edge(token_file=str(file), follow_interval=0.01) as edge:
            await post(edge, 2)
            for query in ("", "&bodies=0"):
                path = f"{edge.url}/events?follow=1&after=0{query}"
                async with edge.client.get(path, headers=BEARER) as response:
                    while b"id: 2" not in await response.content.readline():
                        pass
            await eventually(lambda: len(shown(entries)) == 2)
            await eventually(lambda: edge.metric("fi_ingest_followers") == 0.0)
    line = {"event": "BODIES_SHOWN", "token": "night", "remote": "127.0.0.1"}
    assert [line | {"follow": "started", "events": 0}, line | {"follow": "ended", "events": 2}] == shown(entries)


async def test_without_tokens_the_line_has_the_address_alone() -> None:
    """There is no name that would be true."""
    with capture_logs() as entries:
        async with running_edge() as edge:
            await edge.post("c-1", BODY)
            await edge.request("GET", EVENTS)
    line = {"event": "BODIES_SHOWN", "remote": "127.0.0.1", "consultation_id": "c-1", "events": 1}
    assert [line] == shown(entries)
