"""Messages as the NATS protocol writes them, many at a time.

nats-py's ``publish`` takes some 10 µs a message, most of it for looking at headers that are ours and for waking up its
writer. A batch of 1,000 is written here into a few blocks.
"""

from __future__ import annotations

from collections.abc import Mapping

from nats.aio.client import Client


def hpub(subject: str, reply_to: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """Return the bytes that publish *body* with *headers*, an answer going to *reply_to*, or none when that is empty.

    Raises:
        ValueError: subject or headers hold what would end their line, or other than ASCII.
    """
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    if head.count("\n") != len(headers) or " " in subject or "\n" in subject:
        raise ValueError("a subject has no blanks, a header no line breaks")
    block = f"NATS/1.0\r\n{head}\r\n".encode("ascii")
    line = f"HPUB {subject} {reply_to} {len(block)} {len(block) + len(body)}\r\n".encode("ascii")
    return b"".join((line, block, body, b"\r\n"))


async def write(nc: Client, block: bytes, messages: int) -> None:
    """Write *messages* messages, which :func:`hpub` made a *block* of, as :meth:`Client.publish` writes one."""
    nc.stats["out_msgs"] += messages
    nc.stats["out_bytes"] += len(block)
    await nc._send_command(block)
    if nc._flush_queue is not None and nc._flush_queue.empty():
        await nc._flush_pending()
