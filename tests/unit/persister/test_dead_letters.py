"""Poison: what a dead letter carries, and when there are too many."""

from __future__ import annotations

import orjson
import pytest
import structlog

from services.log.protocol import Delivery, LogIdentity
from services.persister.dead_letters import DeadLetters, PoisonLimit, Quarantine
from services.persister.errors import PoisonFloodError
from services.persister.metrics import PersisterMetrics


class Recorder:
    """Takes dead letters."""

    def __init__(self, max_bytes: int = 10_000) -> None:
        self.max_bytes = max_bytes
        self.sent: list[tuple[int, bytes, dict[str, str]]] = []

    async def store(self, partition: int, body: bytes, headers: dict[str, str]) -> None:
        self.sent.append((partition, body, headers))


async def test_a_dead_letter_tells_reason_and_origin_and_keeps_the_body() -> None:
    """`nats stream view fi-dead` must be enough to see what happened; its id is the same when it is sent again."""
    recorder = Recorder()
    letters = DeadLetters(recorder, 3, LogIdentity("fi-events", "2026-11-23T10:00:00Z"))
    delivery = Delivery(17, "c1", {"Nats-Msg-Id": "c1/é\nx"}, b"\xff", "token")
    await letters.send(delivery, "no JSON")
    assert recorder.sent == [
        (
            3,
            b"\xff",
            {
                "Nats-Msg-Id": "fi-events/2026-11-23T10:00:00Z/17",
                "Fi-Reason": "no JSON",
                "Fi-Stream-Sequence": "17",
                "Fi-Consultation": "c1",
                "Fi-Original-Msg-Id": "c1/x",
                "Fi-Altered": "Fi-Original-Msg-Id",
            },
        )
    ]


def test_a_few_bad_messages_among_good_ones_are_fine() -> None:
    """One in twenty is below the ratio of one in ten."""
    limit = PoisonLimit(streak=5, ratio=0.1, window=100)
    for number in range(1, 1001, 20):
        limit.count(number)


def test_a_streak_of_bad_messages_stops() -> None:
    """Whatever came before."""
    limit = PoisonLimit(streak=5, ratio=1.0, window=1000)
    for number in range(501, 505):
        limit.count(number)
    with pytest.raises(PoisonFloodError, match="5 poison messages in a row"):
        limit.count(505)


def test_too_large_a_share_of_bad_messages_stops() -> None:
    """Good ones in between do not hide a bad release; but a share of few messages says nothing yet."""
    limit = PoisonLimit(streak=1000, ratio=0.1, window=100)
    for number in range(1, 100, 2):
        limit.count(number)
    with pytest.raises(PoisonFloodError, match="50 of the last 100"):
        limit.count(101)


async def test_a_body_that_would_not_fit_is_cut() -> None:
    """Our headers are longer than its own; whole, the broker would refuse it for ever, and the partition would stop."""
    recorder = Recorder()
    letters = DeadLetters(recorder, 3, LogIdentity("fi-events", "2026-11-23T10:00:00Z"))
    await letters.send(Delivery(17, "c1", None, b"x" * 9_990, "token"), "no JSON")
    ((_, body, headers),) = recorder.sent
    assert len(body) + sum(len(name) + len(value) + 4 for name, value in headers.items()) < 10_000
    assert headers["Fi-Cut-From-Bytes"] == "9990"


async def test_headers_of_a_dead_letter_stay_small() -> None:
    """A foreign subject or message id may be as long as a line of the protocol."""
    recorder = Recorder()
    letters = DeadLetters(recorder, 3, LogIdentity("fi-events", "2026-11-23T10:00:00Z"))
    await letters.send(Delivery(17, "z" * 3900, {"Nats-Msg-Id": "m" * 9000}, b"", "token"), "bad id")
    ((_, _, headers),) = recorder.sent
    assert ("z" * 512, "m" * 512) == (headers["Fi-Consultation"], headers["Fi-Original-Msg-Id"])


def test_good_batches_between_break_a_streak() -> None:
    """A bad message a day is no flood, however many days."""
    limit = PoisonLimit(streak=5, ratio=0.5, window=100)
    for number in range(1, 401, 4):
        limit.count(number)


def test_good_batches_count_for_the_ratio() -> None:
    """More of them than the window holds leave nothing bad in it."""
    limit = PoisonLimit(streak=1000, ratio=0.1, window=100)
    for number in (*range(1, 10), *range(5010, 5020)):
        limit.count(number)
    with pytest.raises(PoisonFloodError, match="11 of the last 100"):
        limit.count(5020)


def test_without_a_limit_everything_may_be_set_aside() -> None:
    """An operator who has looked at them wants the partition to go on."""
    limit = PoisonLimit(streak=0, window=10)
    for number in range(1, 5001):
        limit.count(number)


async def test_events_under_used_keys_are_listed_in_letters_that_fit() -> None:
    """By consultation: the sequence of each, and that of the first event under its key."""
    recorder = Recorder()
    letters = DeadLetters(recorder, 3, LogIdentity("fi-events", "2026-11-23T10:00:00Z"))
    await letters.list_conflicts([(f"c{number % 2}", number, number - 10) for number in range(20, 60)])
    listed: list[tuple[str, int, int]] = []
    for _, body, headers in recorder.sent:
        assert len(body) + sum(len(name) + len(value) + 4 for name, value in headers.items()) < 10_000
        lines = [orjson.loads(line) for line in body.splitlines()]
        assert int(headers["Fi-Listed"]) == sum(len(line["conflicts"]) for line in lines)
        listed += [(line["consultation_id"], *pair) for line in lines for pair in line["conflicts"]]
    assert sorted(listed) == sorted((f"c{number % 2}", number, number - 10) for number in range(20, 60))
    assert len(recorder.sent) == 2
    _, _, first = recorder.sent[0]
    assert ("fi-events/2026-11-23T10:00:00Z/20-42", "20") == (first["Nats-Msg-Id"], first["Fi-Stream-Sequence"])
    assert "another body" in first["Fi-Reason"]


def test_a_batch_that_failed_is_retried_one_by_one_until_its_poison_is_known() -> None:
    """What fails twice on its own is poison; after its commit nothing of it is remembered."""
    dead_letters = DeadLetters(Recorder(), 0, LogIdentity("fi-events", "2026-11-23T10:00:00Z"))
    quarantine = Quarantine(dead_letters, PoisonLimit(), PersisterMetrics().of(0), structlog.get_logger())
    first, second = (Delivery(n, "c1", None, b"", "token") for n in (1, 2))
    quarantine.failed([first, second], ValueError("secret"))
    assert quarantine.one_by_one
    quarantine.succeeded([first])
    quarantine.failed([second], ValueError("secret"))
    assert {} == quarantine.known
    quarantine.failed([second], ValueError("secret"))
    assert {2: "could not be written: ValueError"} == quarantine.known
    quarantine.succeeded([second])
    assert ({}, False) == (quarantine.known, quarantine.one_by_one)
