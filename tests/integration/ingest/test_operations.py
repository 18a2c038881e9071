"""What operators see and do over HTTP, and who may: state, dead letters, conflicts, verification."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, MutableMapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
from structlog.testing import capture_logs

from fiq.event import Event, new_event_id
from services.core.tokens import Scope, Token, digest_of, render
from services.log.dead_letters import conflict_letters, read_letter
from services.log.errors import DuplicateInFlightError, LogFullError, LogRefusedError, LogUnavailableError
from services.log.protocol import SequencedEvent
from services.log.questions import Damage, Verification
from services.log.settings import LogSettings
from tests.support.ingest import Edge, Reply, dead_letter, running_edge
from tests.support.polling import eventually

TOKENS = {
    "operator": Token("operator", digest_of("operator"), frozenset({Scope.OPS})),
    "admin": Token("admin", digest_of("admin"), frozenset({Scope.ADMIN})),
    "clinic": Token("clinic", digest_of("clinic"), frozenset({Scope.READ, Scope.WRITE})),
    "ward": Token("ward", digest_of("ward"), frozenset({Scope.ADMIN}), "ward-"),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(render(TOKENS.values()))
    return path


async def get(edge: Edge, path: str, name: str) -> int:
    return (await edge.request("GET", path, headers={"Authorization": f"Bearer {name}"})).status


@pytest.mark.parametrize("path", ["/pipeline", "/dead-letters"])
async def test_an_operators_token_sees_the_pipeline_and_a_clinics_does_not(file: Path, path: str) -> None:
    """Nor does one for the consultations of a ward, whatever its scopes; and an operator reads no consultation."""
    async with running_edge(token_file=str(file)) as edge:
        assert {"operator": 200, "admin": 200, "clinic": 403, "ward": 403} == {
            name: await get(edge, path, name) for name in TOKENS
        }
        assert 403 == await get(edge, "/consultations/c-1/events", "operator")
        assert 403 == await get(edge, "/consultations", "operator")


async def test_without_tokens_everybody_sees_the_pipeline() -> None:
    """As with `fiq up`, on loopback; what is not known yet is null."""
    async with running_edge() as edge:
        reply = await edge.request("GET", "/pipeline")
        assert (200, "no-store") == (reply.status, reply.headers["Cache-Control"])
        assert (None, [], None) == tuple(reply.json[key] for key in ("seen_seconds", "nodes", "stream"))


# -- dead letters -----------------------------------------------------------------------------------------------------

BODY = b'{"event_type":"T","payload":"private"}'
EVENT = Event("c-1", new_event_id(), 1, BODY)


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_edge() as edge:
        yield edge


async def act(edge: Edge, path: str, document: object = None, **headers: str) -> Reply:
    body = None if document is None else orjson.dumps(document)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None:
        names.setdefault("Content-Type", "application/json")
    return await edge.request("POST", path, data=body, headers=names)


def audited(entries: Sequence[MutableMapping[str, Any]]) -> list[dict[str, Any]]:
    left_out = {"component", "log_level", "remote"}
    found = (entry for entry in entries if entry.get("component") == "audit")
    return [{key: value for key, value in entry.items() if key not in left_out} for entry in found]


async def test_dead_letters_are_listed_in_pages_without_their_bodies(edge: Edge) -> None:
    """What was set aside, why, from where, and whether it can go back."""
    for sequence in (2, 3, 5):
        edge.log.letters.letters[sequence] = dead_letter(sequence, EVENT)
    edge.log.letters.letters[7] = dead_letter(7, EVENT, Fi_Cut_From_Bytes="99")
    with capture_logs() as entries:
        first = await edge.request("GET", "/dead-letters?limit=3")
        second = await edge.request("GET", first.json["next"])
    assert [2, 3, 5, 7] == [one["sequence"] for one in first.json["dead_letters"] + second.json["dead_letters"]]
    assert ("message", "05", 7, "c-1", str(EVENT.event_id), len(BODY), None) == tuple(
        first.json["dead_letters"][0][key]
        for key in ("kind", "partition", "stream_sequence", "consultation_id", "message_id", "bytes", "obstacle")
    )
    assert "cut" in second.json["dead_letters"][0]["obstacle"]
    assert second.json["next"] is None
    assert b"private" not in first.content + second.content
    assert [] == audited(entries)


async def test_a_dead_letter_is_shown_with_its_body_and_that_is_audited(edge: Edge) -> None:
    """As text, byte for byte; as Base64 what is no text."""
    edge.log.letters.letters[2] = dead_letter(2, EVENT)
    edge.log.letters.letters[3] = replace(dead_letter(3, EVENT), body=b"\xff\x00")
    with capture_logs() as entries:
        assert BODY.decode() == (await edge.request("GET", "/dead-letters/2")).json["body"]
        assert "/wA=" == (await edge.request("GET", "/dead-letters/3")).json["body_base64"]
    assert [{"event": "BODIES_SHOWN", "events": 1, "dead_letter": sequence} for sequence in (2, 3)] == audited(entries)
    assert "private" not in str(entries)


async def test_a_list_of_conflicts_is_shown_with_the_events_that_the_corpus_keeps(edge: Edge) -> None:
    """Their bodies come from the owner; what it does not have is counted."""
    edge.log.reader.kept = [SequencedEvent(9, EVENT, written_ns=2)]
    ((body, headers),) = conflict_letters("log", [("c-1", 9, 4), ("c-1", 11, 4)], 9999)
    edge.log.letters.letters[2] = read_letter(2, "2026-11-23T10:00:00Z", "fi.dead.5", headers, body)
    with capture_logs() as entries:
        (listed,) = (await edge.request("GET", "/dead-letters")).json["dead_letters"]
        shown = await edge.request("GET", "/dead-letters/2")
    assert ("conflicts", 2) == (listed["kind"], listed["conflicts"])
    assert "/conflicts" in listed["obstacle"]
    assert [(9, 4, "c-1")] == [
        (one["sequence"], one["first_sequence"], one["consultation_id"]) for one in shown.json["events"]
    ]
    assert BODY in shown.content
    assert 1 == shown.json["left_out"]
    assert [{"event": "BODIES_SHOWN", "events": 1, "dead_letter": 2}] == audited(entries)
    assert 422 == (await act(edge, "/dead-letters/2/requeue")).status


async def test_a_requeued_letter_is_posted_again_as_it_was_and_is_gone(edge: Edge) -> None:
    """Same consultation, id, time and body; who did it, and why, is audited."""
    edge.log.letters.letters[2] = dead_letter(2, EVENT)
    with capture_logs() as entries:
        reply = await act(edge, "/dead-letters/2/requeue", {"reason": "persister 0.2 takes it"})
    expected = {
        "status": "requeued",
        "sequence": 2,
        "consultation_id": "c-1",
        "message_id": str(EVENT.event_id),
        "stream_sequence": 1,
    }
    assert (200, expected) == (reply.status, reply.json)
    assert [EVENT] == edge.log.events
    assert {} == edge.log.letters.letters
    line = {
        "event": "DEAD_LETTER_REQUEUED",
        "dead_letter": 2,
        "consultation_id": "c-1",
        "message_id": str(EVENT.event_id),
        "sequence": 1,
        "reason": "persister 0.2 takes it",
    }
    assert [line] == audited(entries)
    assert "private" not in str(entries)
    assert "/problems/unknown-dead-letter" == (await act(edge, "/dead-letters/2/requeue")).json["type"]


async def test_a_requeue_that_was_cut_off_is_done_by_the_next_one(edge: Edge) -> None:
    """The event is in the log, the letter still there; the same is true when a client has posted it again."""
    edge.log.events.append(EVENT)
    edge.log.letters.letters[2] = dead_letter(2, EVENT)
    assert (200, 1) == ((reply := await act(edge, "/dead-letters/2/requeue")).status, reply.json["stream_sequence"])
    assert [EVENT] == edge.log.events
    assert {} == edge.log.letters.letters


async def test_while_the_log_knows_the_first_message_a_requeue_is_too_early(edge: Edge) -> None:
    """It would drop the event as a duplicate of the one that was set aside: the letter stays."""
    edge.log.events += [Event("c-1", new_event_id(), 1, b'{"event_type":"A"}') for _ in range(6)] + [EVENT]
    stored = (datetime.now(UTC) - timedelta(seconds=LogSettings().duplicate_window - 100)).isoformat()
    edge.log.letters.letters[2] = dead_letter(2, EVENT, stored=stored)
    reply = await act(edge, "/dead-letters/2/requeue")
    assert (409, "/problems/requeue-too-early") == (reply.status, reply.json["type"])
    assert 95 <= int(reply.headers["Retry-After"]) <= 101
    assert [2] == list(edge.log.letters.letters)


async def test_another_event_under_the_key_keeps_the_letter(edge: Edge) -> None:
    """It was posted meanwhile; an operator must decide."""
    edge.log.events.append(Event("c-1", EVENT.event_id, 1, b'{"event_type":"other"}'))
    edge.log.letters.letters[2] = dead_letter(2, EVENT)
    reply = await act(edge, "/dead-letters/2/requeue")
    assert (422, "/problems/not-requeueable") == (reply.status, reply.json["type"])
    assert [2] == list(edge.log.letters.letters)


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (LogFullError("full"), "log-full"),
        (LogUnavailableError("away"), "log-unavailable"),
        (DuplicateInFlightError("racing"), "duplicate-in-flight"),
        (LogRefusedError("no permission"), "log-refused"),
    ],
)
async def test_a_log_that_does_not_take_it_keeps_the_letter(edge: Edge, error: Exception, problem: str) -> None:
    """And nothing is audited as done."""
    edge.log.error = error
    edge.log.letters.letters[2] = dead_letter(2, EVENT)
    with capture_logs() as entries:
        reply = await act(edge, "/dead-letters/2/requeue")
    assert f"/problems/{problem}" == reply.json["type"]
    assert [2] == list(edge.log.letters.letters)
    assert [] == audited(entries)


async def test_a_dropped_letter_is_gone_and_its_reason_is_audited(edge: Edge) -> None:
    """Without a reason nothing is dropped."""
    edge.log.letters.letters[2] = dead_letter(2, EVENT)
    refused: list[object] = [{}, {"reason": ""}, {"reason": " "}, {"reason": "x" * 501}, {"reason": 1}, [], "x"]
    for document in refused:
        reply = await act(edge, "/dead-letters/2/drop", document)
        assert (422, "/problems/invalid-action") == (reply.status, reply.json["type"])
        assert "the reason must not be empty or blank" in reply.json["detail"]
    with capture_logs() as entries:
        assert (200, {"status": "dropped", "sequence": 2}) == (
            (reply := await act(edge, "/dead-letters/2/drop", {"reason": "a test"})).status,
            reply.json,
        )
    line = {
        "event": "DEAD_LETTER_DROPPED",
        "dead_letter": 2,
        "consultation_id": "c-1",
        "message_id": EVENT.message_id,
        "stream_sequence": 7,
        "reason": "a test",
    }
    assert [line] == audited(entries)
    assert {} == edge.log.letters.letters
    assert [] == edge.log.events
    assert 404 == (await act(edge, "/dead-letters/2/drop", {"reason": "a test"})).status


@pytest.mark.parametrize("sequence", ["0", "x", "-1", "9" * 30, "%C2%B2"])
async def test_what_is_no_dead_letter_is_404(edge: Edge, sequence: str) -> None:
    """Whatever the path says."""
    for method, path in (("GET", ""), ("POST", "/requeue"), ("POST", "/drop")):
        body = {"data": b'{"reason":"x"}', "headers": {"Content-Type": "application/json"}} if method == "POST" else {}
        reply = await edge.request(method, f"/dead-letters/{sequence}{path}", **body)
        assert (404, "/problems/unknown-dead-letter") == (reply.status, reply.json["type"])


async def test_the_body_of_an_action_is_small_json(edge: Edge) -> None:
    """A form that another site submits has another type, and changes nothing."""
    edge.log.letters.letters[2] = dead_letter(2, EVENT)
    for path in ("/dead-letters/2/requeue", "/dead-letters/2/drop"):
        assert 415 == (await act(edge, path, {"reason": "x"}, Content_Type="text/plain")).status
        assert 413 == (await act(edge, path, {"reason": "x" * 9000})).status
        broken = {"data": b"{", "headers": {"Content-Type": "application/json"}}
        assert 400 == (await edge.request("POST", path, **broken)).status
    assert [2] == list(edge.log.letters.letters)


# -- conflicts and verification ---------------------------------------------------------------------------------------


async def test_the_conflicts_of_a_consultation_are_read_like_its_events(edge: Edge) -> None:
    """In pages, as NDJSON, and without bodies; the answers with bodies are audited."""
    edge.log.reader.kept = [SequencedEvent(sequence, EVENT, written_ns=2) for sequence in (9, 11, 12)]
    path = "/consultations/c-1/conflicts"
    with capture_logs() as entries:
        first = await edge.request("GET", f"{path}?limit=2")
        second = await edge.request("GET", first.json["next"])
        lines = await edge.request("GET", path, headers={"Accept": "application/x-ndjson"})
        bare = await edge.request("GET", f"{path}?bodies=0")
        other = await edge.request("GET", "/consultations/c-2/conflicts")
    assert [9, 11, 12] == [one["sequence"] for one in first.json["conflicts"] + second.json["conflicts"]]
    assert str(EVENT.event_id) == first.json["conflicts"][0]["message_id"]
    assert BODY in first.content
    assert 3 == len(lines.content.splitlines())
    assert [("T", len(BODY))] * 3 == [(one["event_type"], one["bytes"]) for one in bare.json["conflicts"]]
    assert b"private" not in bare.content
    assert [] == other.json["conflicts"]
    assert [2, 1, 3] == [line["events"] for line in audited(entries)]


@pytest.mark.parametrize(
    ("found", "result", "first"),
    [
        (Verification(20, 10, 10, [], 0, "ab" * 32), "intact", None),
        (Verification(20, 0, 0, [], 0, ""), "intact", None),
        (Verification(20, 10, 4, [], 0, "ab" * 32), "unfinished", None),
        (Verification(20, 10, 10, [Damage("chain", "it breaks", 7)], 3, "ab" * 32), "damaged", 7),
        (Verification(20, 10, 0, [Damage("unreadable", "HDF5 cannot", 0)], 1, ""), "damaged", None),
    ],
)
async def test_a_verification_says_how_it_ended(
    edge: Edge, found: Verification, result: str, first: int | None
) -> None:
    """Intact, damaged from an event on, or not finished in time; no body is shown."""
    edge.log.reader.verification = found
    with capture_logs() as entries:
        shown = (await edge.request("GET", "/consultations/c-1/verification")).json
    assert (result, first, found.found) == (shown["result"], shown["first_damaged_sequence"], shown["problems"])
    assert (found.events, found.checked) == (shown["events"], shown["checked"])
    assert [] == audited(entries)


async def test_a_third_verification_at_a_time_is_refused(edge: Edge) -> None:
    """Each keeps a persister busy; other reads go on."""
    gate = edge.log.reader.gate = asyncio.Event()
    path = "/consultations/c-1/verification"
    both = [asyncio.create_task(edge.request("GET", path)) for _ in range(2)]
    await eventually(lambda: edge.log.reader.asked.count("verify") == 2)
    third = await edge.request("GET", path)
    assert (429, "/problems/too-many-in-flight") == (third.status, third.json["type"])
    assert 200 == (await edge.request("GET", "/consultations/c-1/events")).status
    gate.set()
    assert [200, 200] == [(await one).status for one in both]
    assert 200 == (await edge.request("GET", path)).status
