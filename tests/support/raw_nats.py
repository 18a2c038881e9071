"""Publishes over a plain socket: what no client library would send, and the server takes all the same."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

#: consultation tokens that nats-server 2.15 stores: no UTF-8, control characters that are white space, very long ones
SUBJECTS = (b"\xff\xfe", b"a\x0bb", b"a\x0cb", b"a\x00b", b"a\rb", b"a?b", b"\xc3\xa9", b"z" * 3900)
#: header blocks that it stores as well
HEADERS = (
    b"NATS/1.0\r\nX-\xff: \xfe\r\n\r\n",
    b"NATS/1.0\r\nno colon here\r\n\r\n",
    b"NATS/1.0 \xff\xff\xff \xfe\r\n\r\n",
    b"NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Consumer: 7\r\n\r\n",
    b"NATS/1.0\r\n\r\n",
    b"NATS/1.0",
    b"garbage",
    b"\r\n",
    b"NATS/1.0\r\nNats-Msg-Id: a\xff\r\n\r\n",
)


def message(consultation: bytes, headers: bytes = b"", body: bytes = b"garbage") -> bytes:
    """Return the protocol's bytes for an event of *consultation*."""
    subject = b"fi.events." + consultation
    if headers:
        return b"HPUB %b %d %d\r\n%b%b\r\n" % (subject, len(headers), len(headers) + len(body), headers, body)
    return b"PUB %b %d\r\n%b\r\n" % (subject, len(body), body)


async def publish_raw(url: str, commands: Iterable[bytes]) -> None:
    """Send *commands* to the node at *url*; each must be taken with +OK."""
    host, _, port = url.removeprefix("nats://").rpartition(":")
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection(host, int(port))
        await reader.readline()  # INFO
        for command in (b'CONNECT {"verbose":true,"headers":true,"no_responders":true}\r\n', *commands):
            writer.write(command)
            answer = await reader.readline()
            assert answer == b"+OK\r\n", answer
        writer.close()
        await writer.wait_closed()
