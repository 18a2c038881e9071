"""What an answer of the broker means for the message that was published."""

from __future__ import annotations

import orjson
import pytest

from fiq.errors import FiqError
from services.log.errors import LogFullError, LogRefusedError
from services.log.jetstream.publisher import TryAgain, read_ack, read_batch_ack
from services.log.protocol import Appended


def _error(code: int, err_code: int, description: str) -> bytes:
    return orjson.dumps({"error": {"code": code, "err_code": err_code, "description": description}, "seq": 0})


def test_an_acknowledgement_gives_the_position() -> None:
    """A new message."""
    assert read_ack(b'{"stream":"fi-events","seq":7}', None, "fi-events") == Appended(7, duplicate=False)


def test_a_duplicate_gives_the_position_of_the_first_one() -> None:
    """The broker says so in its acknowledgement."""
    ack = b'{"stream":"fi-events","seq":7,"duplicate": true}'

    assert read_ack(ack, None, "fi-events") == Appended(7, duplicate=True)


def test_no_responders_may_be_tried_again() -> None:
    """Without a leader the subject has no subscriber, and the server answers 503."""
    assert isinstance(read_ack(b"", {"Status": "503"}, "fi-events"), TryAgain)


@pytest.mark.parametrize("err_code", [10008, 10023, 10077, 10158, 10167])
def test_codes_of_passing_trouble_may_be_tried_again(err_code: int) -> None:
    """DESIGN, section 9."""
    again = read_ack(_error(503, err_code, "raft: something"), None, "fi-events")

    assert again == TryAgain(f"raft: something (err_code {err_code})", err_code)


@pytest.mark.parametrize(
    ("err_code", "text"),
    [
        (10077, "maximum bytes exceeded"),
        (10077, "maximum messages exceeded"),
        (10047, "insufficient storage resources available"),
        (10002, "resource limits exceeded for account"),
    ],
)
def test_a_stream_at_its_limit_is_full(err_code: int, text: str) -> None:
    """The code alone does not tell: 10077 is any failure to store."""
    with pytest.raises(LogFullError, match=text):
        read_ack(_error(503, err_code, text), None, "fi-events")


@pytest.mark.parametrize("err_code", [10025, 10054, 10060, 10071, 10097])
def test_fatal_codes_are_refusals(err_code: int) -> None:
    """DESIGN, section 9: the same message would be refused again."""
    with pytest.raises(LogRefusedError):
        read_ack(_error(400, err_code, "no"), None, "fi-events")


@pytest.mark.parametrize("answer", [b"", b"+OK", b"[]", b'{"stream":"other","seq":1}', b'{"seq":1}'])
def test_an_answer_that_is_not_the_streams_is_a_refusal(answer: bytes) -> None:
    """Another stream or service on our subjects must not count as storage."""
    with pytest.raises(LogRefusedError):
        read_ack(answer, None, "fi-events")


def test_no_error_quotes_what_was_answered() -> None:
    """A service that echoes would bring the payload into our messages."""
    with pytest.raises(FiqError) as caught:
        read_ack(b'{"payload": "secret"', None, "fi-events")

    assert "secret" not in str(caught.value)


def test_the_answer_to_a_batch_gives_each_message_its_position() -> None:
    """It names the last position; the ones before it are consecutive."""
    ack = b'{"stream":"fi-events","seq":9,"batch":"b","count":3}'

    assert read_batch_ack(ack, None, "fi-events", 3) == [Appended(at, duplicate=False) for at in (7, 8, 9)]


@pytest.mark.parametrize("err_code", [10158, 10176, 10201, 10210])
def test_what_stops_a_batch_may_be_tried_otherwise(err_code: int) -> None:
    """In flight, incomplete after a change of leaders, with a known message, too many batches at once."""
    assert read_batch_ack(_error(400, err_code, "no"), None, "fi-events", 3) == TryAgain(
        f"no (err_code {err_code})", err_code
    )


@pytest.mark.parametrize(
    "answer", [b"", b'{"stream":"fi-events","seq":9}', b'{"stream":"fi-events","seq":9,"count":2}']
)
def test_an_answer_to_a_batch_that_is_not_about_all_of_it_is_a_refusal(answer: bytes) -> None:
    """A broker that knows no batches stores each message by itself and counts none; the first message gets no data."""
    with pytest.raises(LogRefusedError):
        read_batch_ack(answer, None, "fi-events", 3)
