"""What is read from STREAM.INFO, in states that are hard to bring about on purpose."""

from __future__ import annotations

from typing import Any

import pytest

from services.log.jetstream.stream import read_stream

SECOND = 10**9


def _info(*peers: dict[str, Any], leader: str = "n1") -> dict[str, Any]:
    return {
        "created": "2026-01-01T00:00:00Z",
        "config": {"max_bytes": 100, "metadata": {"fi_partitions": "16"}},
        "state": {"messages": 1, "bytes": 80, "first_seq": 1, "last_seq": 1},
        "cluster": {"leader": leader, "replicas": list(peers)},
    }


def _peer(name: str, active: float, **more: Any) -> dict[str, Any]:
    return {"name": name, "current": True, "active": int(active * SECOND), **more}


@pytest.mark.parametrize(
    ("peers", "quorum"),
    [
        ([_peer("n2", 0.1), _peer("n3", 0.1)], True),
        ([_peer("n2", 0.1), _peer("n3", 60, current=False, lag=9)], True),
        ([_peer("n2", 0.1, current=False, lag=9), _peer("n3", 60)], True),
        ([_peer("n2", 60), _peer("n3", 60)], False),
        ([_peer("n2", 0.1, offline=True), _peer("n3", 0, current=False)], False),
    ],
)
def test_a_majority_must_have_been_heard_of_lately(peers: list[dict[str, Any]], quorum: bool) -> None:
    """A leader that lost its followers keeps answering for a while; a follower that lags still counts."""
    assert read_stream(_info(*peers)).has_quorum is quorum


def test_a_single_server_leads_itself() -> None:
    """Without a cluster there is no section about it."""
    info = _info()
    del info["cluster"]

    stream = read_stream(info)

    assert stream.leader
    assert stream.has_quorum


def test_a_stream_of_another_program_has_no_partitions() -> None:
    """`fiq status` must not fail on it."""
    info = _info()
    info["config"]["metadata"] = None

    assert read_stream(info).partitions == 0
