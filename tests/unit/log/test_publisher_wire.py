"""Messages written for the wire are those that nats-py writes."""

from __future__ import annotations

import pytest

from services.log.jetstream.connection import Connection
from services.log.jetstream.publisher import hpub
from services.log.settings import LogSettings

HEADERS = {"Nats-Msg-Id": "c-1/x", "Fi-Received-Ns": "17"}


class _Recorder(Connection):
    """A client without a connection, which keeps what it would send."""

    def __init__(self) -> None:
        super().__init__(LogSettings(), pytest.fail)
        self.sent = b""

    async def _send_command(self, cmd: bytes, priority: bool = False) -> None:
        self.sent += cmd


@pytest.mark.parametrize("reply_to", ["", "_INBOX.x"])
async def test_a_message_is_written_as_nats_py_does(reply_to: str) -> None:
    """Byte for byte, with and without an answer; and counted in the client's statistics."""
    theirs, ours = _Recorder(), _Recorder()
    await theirs._send_publish("fi.events.c-1", reply_to, b'{"a": 1}', 8, dict(HEADERS))

    await ours.write_block(hpub("fi.events.c-1", reply_to, HEADERS, b'{"a": 1}'), 1)

    assert theirs.sent == ours.sent
    assert ours.stats["out_msgs"] == 1


@pytest.mark.parametrize(
    ("subject", "headers"),
    [
        ("fi.events.a b", HEADERS),
        ("fi.events.a\nb", HEADERS),
        ("fi.events.ä", HEADERS),
        ("fi.events.a", {"Nats-Msg-Id": "a\r\nb"}),
        ("fi.events.a", {"Nats-Msg-Id": "ä"}),
    ],
)
def test_what_would_break_the_protocol_is_refused(subject: str, headers: dict[str, str]) -> None:
    """The rest of such a message would be read as a command."""
    with pytest.raises(ValueError, match=r"blanks|ascii"):
        hpub(subject, "", headers, b"{}")
