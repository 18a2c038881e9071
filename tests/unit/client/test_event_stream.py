"""Server-Sent Events, as they come over a connection."""

from __future__ import annotations

import pytest

from fiq.client.client import EventStreamParser

TEXT = "\ufeffdata: one\r\n: comment\r\nid: 4\r\n\r\ndata:two\rdata: lines\r\rdata: ü\nevent: x\n\n\ndata: cut off\n"


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_server_sent_events_may_come_in_any_pieces(size: int) -> None:
    """Each of the three line ends, characters of several bytes, comments: cut anywhere."""
    raw = TEXT.encode()
    parser = EventStreamParser()
    found = [data for at in range(0, len(raw), size) for data in parser.feed(raw[at : at + size])]
    assert ["one", "two\nlines", "ü"] == found
    assert "4" == parser.last_id


def test_an_id_counts_with_the_end_of_its_message() -> None:
    """Also of a message without data; one that was cut off will come again."""
    parser = EventStreamParser()
    for piece, expected in ((b"id: 1\n", ""), (b": comment\n\n", "1"), (b"id: 2\ndata: x\n", "1"), (b"\n", "2")):
        list(parser.feed(piece))
        assert expected == parser.last_id
