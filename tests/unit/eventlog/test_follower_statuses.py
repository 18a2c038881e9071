"""What the follower makes of the broker's own messages; the rest of it is tested on a real cluster."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
from nats.aio.msg import Msg

from services.eventlog.jetstream.budget import Budget
from services.eventlog.jetstream.follower import JetStreamFollower
from services.eventlog.protocol import LogIdentity


@pytest.fixture
def follower() -> JetStreamFollower:
    nc = cast("Any", SimpleNamespace(max_payload=2**20))
    return JetStreamFollower(nc, "fi-workers-main-00", 0, LogIdentity("fi-events", ""), budget=Budget(64, 0))


def delivered(follower: JetStreamFollower, number: int) -> None:
    reply = f"$JS.ACK.fi-events.fi-workers-main-00.1.{number + 100}.{number}.1.0"
    follower._delivered(Msg(_client=cast("Any", None), subject="fi.events.0.c1", reply=reply, data=b"{}"))


def heartbeat(follower: JetStreamFollower, sent: int) -> str:
    headers = {"Status": "100", "Description": "Idle Heartbeat", "Nats-Last-Consumer": str(sent)}
    follower._status(Msg(_client=cast("Any", None), subject="inbox.1", headers=headers))
    return follower._doubt


async def test_a_batch_waits_for_no_more_than_its_first_event(
    follower: JetStreamFollower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is idle is written within 100 ms, so nothing may be added to the time that the broker and the disk take."""
    follower._alive_at = time.monotonic()
    waiting = asyncio.create_task(follower.batch(max_events=8192, max_bytes=2**24))
    await asyncio.sleep(0)
    timers: list[float] = []
    monkeypatch.setattr(asyncio.get_running_loop(), "call_at", lambda when, *_, **__: timers.append(when))
    delivered(follower, 1)
    assert [101] == [one.sequence for one in await waiting]
    assert [] == timers


def test_a_heartbeat_that_agrees_raises_no_doubt(follower: JetStreamFollower) -> None:
    """All that was sent has come."""
    delivered(follower, 1)
    assert ["", ""] == [heartbeat(follower, 1), heartbeat(follower, 1)]


def test_a_heartbeat_may_overtake_messages_once(follower: JetStreamFollower) -> None:
    """A replicated consumer sends it at once, messages when the nodes agree: slowness is no loss."""
    delivered(follower, 1)
    assert not heartbeat(follower, 3)
    delivered(follower, 2)
    assert not heartbeat(follower, 4)
    delivered(follower, 3)
    delivered(follower, 4)
    assert not heartbeat(follower, 4)


def test_messages_that_have_not_come_by_the_next_heartbeat_are_lost(follower: JetStreamFollower) -> None:
    """Then the consumer is reset to what is committed."""
    delivered(follower, 1)
    assert ["", "gap"] == [heartbeat(follower, 3), heartbeat(follower, 3)]


def test_a_consumer_that_sent_less_than_came_was_reset_by_somebody_else(follower: JetStreamFollower) -> None:
    """There is no other explanation, and nothing to wait for."""
    delivered(follower, 1)
    delivered(follower, 2)
    assert heartbeat(follower, 1) == "gap"


def test_a_status_that_nobody_planned_for_is_doubt(follower: JetStreamFollower) -> None:
    """A leadership change, a consumer that was deleted; also an end that does not say what is missing."""
    headers = {"Status": "409", "Description": "Leadership Change"}
    follower._status(Msg(_client=cast("Any", None), subject="inbox.1", headers=headers))
    assert follower._doubt == "status"
