"""What the benchmarks post, and how they read answers."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import orjson
import pytest

from benchmarks import dialogues
from benchmarks.load import answer_status, post
from fiq.event import check_body

ROW = 'ID,section_header,section_text,dialogue\n7,GENHX,Fine.,"Doctor:  Hello. \n and?\nGuest_family: Hi: there. "\n'


@pytest.fixture
def generated(tmp_path: Path) -> dialogues.Dialogues:
    return dialogues.load(tmp_path)


def test_a_line_of_a_dialogue_is_an_event_and_its_summary_the_last(tmp_path: Path) -> None:
    """A line without a speaker belongs to the one before."""
    (tmp_path / "mts-dialog").mkdir()
    (tmp_path / "mts-dialog" / "a.csv").write_text(ROW)
    (bodies,) = dialogues.load(tmp_path).consultations
    payloads = [orjson.loads(check_body(body))["payload"] for body in bodies]
    assert payloads == [
        {"speaker": "Doctor", "text": "Hello."},
        {"speaker": "Doctor", "text": "and?"},
        {"speaker": "Guest_family", "text": "Hi: there."},
        {"section": "GENHX", "text": "Fine."},
    ]


def test_generated_consultations_stand_in_and_are_called_so(generated: dialogues.Dialogues) -> None:
    """The report must not claim real dialogues that were not there."""
    assert generated.source == "generated consultations"
    assert len(generated.bodies) > 10_000


@pytest.mark.parametrize("spread", [10, 100, 500])
def test_500_events_in_a_row_touch_as_many_consultations_as_asked_for(
    generated: dialogues.Dialogues, spread: int
) -> None:
    """And each gets the same number of them."""
    events = list(dialogues.backlog(generated, 1000, spread))
    for start in (0, 500):
        shares = Counter(event.consultation for event in events[start : start + 500])
        assert list(shares.values()) == [500 // spread] * spread


def test_a_consultation_of_a_backlog_has_the_same_length_whatever_the_spread(generated: dialogues.Dialogues) -> None:
    """Only the interleaving differs between the rows of the table."""
    for spread in (10, 100):
        shares = Counter(event.consultation for event in dialogues.backlog(generated, 10_000, spread))
        assert set(shares.values()) == {dialogues.CONSULTATION_EVENTS}
    assert len({event.event_id for event in dialogues.backlog(generated, 10_000, 100)}) == 10_000


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"HTTP/1.1 202 Accepted\r\nContent-Length: 2\r\n\r\n{}", 202),
        (b"HTTP/1.1 202 Accepted\r\ncontent-length: 2\r\n\r\n{", 0),
        (b"HTTP/1.1 202 Accepted\r\nContent-Le", 0),
        (b"HTTP/1.1 204 No Content\r\nServer: x\r\n\r\n", 204),
    ],
)
def test_an_answer_counts_when_it_is_complete(data: bytes, expected: int) -> None:
    """The client reads status and length, nothing else."""
    assert answer_status(data) == expected


def test_a_request_carries_its_key_and_its_length() -> None:
    """It is sent as it is."""
    head, _, body = post(7001, "c-1", "k", b"{}").partition(b"\r\n\r\n")
    assert body == b"{}"
    assert head.startswith(b"POST /consultations/c-1/events HTTP/1.1\r\n")
    assert {b"Idempotency-Key: k", b"Content-Length: 2", b"Content-Type: application/json"} < set(head.split(b"\r\n"))


def test_a_load_keeps_its_number_of_consultations_open(generated: dialogues.Dialogues) -> None:
    """Each has 50 events and then makes room for a new one; the first ones are shorter, so that they end in turn."""
    names = [name for name, _ in itertools.islice(dialogues.posts(generated, 20, "c"), 3000)]
    assert all(len(set(names[start : start + 20])) == 20 for start in range(0, 3000, 20))
    lengths = Counter(names)
    assert {lengths[f"c-{number:06d}"] for number in range(20, 60)} == {50}
    begun = [sum(name not in names[:start] for name in set(names[start : start + 100])) for start in (1000, 1100, 1200)]
    assert [2, 2, 2] == begun
