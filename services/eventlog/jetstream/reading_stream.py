"""Reads the events of one consultation that the stream still holds, without missing one that was acknowledged.

A direct get (ADR-31) is answered by any replica, and one that lags does not have the newest messages. So the stream's
leader is asked first for the last sequence of the subject: it has applied what it acknowledged. Where a direct get ends
before that, the rest is fetched from the leader, one by one.

The answers of a batch are plain messages, which NATS delivers at most once: a reconnect or a slow client loses some.
Each says which sequence was sent before it, and the end says which was the last: behind a hole it is asked again.
"""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import nats.errors
import orjson
from nats.aio.client import Client
from nats.aio.msg import Msg

from services.contract.errors import PoisonError
from services.contract.event import Event, decode
from services.eventlog.errors import LogUnavailableError
from services.eventlog.jetstream.api import ApiError, JetStreamApi
from services.eventlog.jetstream.names import STREAM, stored_subject
from services.eventlog.jetstream.refusals import must_hear

#: messages and bytes of one batched direct get
BATCH_MESSAGES, BATCH_BYTES = 256, 1 << 20
#: how often a batch is asked for of which not even the first message arrives
_TRIES = 3
#: the broker's error code for a message that is not there
_NO_MESSAGE = 10037
_DIRECT_GET = f"$JS.API.DIRECT.GET.{STREAM}"

#: position in the stream, and the event there; None for what is none
Numbered = tuple[int, Event | None]


class StreamReading:
    """The stream, as readers need it.

    Args:
        nc: the connection.
        timeout: seconds for each answer.
    """

    def __init__(self, nc: Client, *, timeout: float) -> None:
        self._nc = nc
        self._api = JetStreamApi(nc, timeout=timeout)
        self._timeout = timeout

    async def last(self, partition: int, consultation: str) -> int:
        """Return the sequence of the consultation's last message, as the leader knows it; 0 when there is none.

        Raises:
            LogUnavailableError: no answer.
        """
        found = await self._leaders({"last_by_subj": stored_subject(partition, consultation)})
        return 0 if found is None else int(found["seq"])

    async def first(self) -> int:
        """Return the first sequence that the stream has not lost to trim.

        Raises:
            LogUnavailableError: no answer, or no stream.
        """
        info = await self._api.stream_info(STREAM)
        if info is None:
            raise LogUnavailableError(f"there is no stream {STREAM}")
        return max(1, int(info["state"]["first_seq"]))

    async def at(self, sequence: int) -> Numbered | None:
        """Return what stands at *sequence*; None when the stream holds nothing there.

        Raises:
            LogUnavailableError: no answer.
        """
        message = await self._api.get_message(STREAM, sequence)
        if message is not None:
            return sequence, _event(message["subject"], message["headers"], message["data"])
        found = await self._leaders({"seq": sequence})  # a replica that lags says the same as one that has trimmed it
        return None if found is None else (sequence, await self._decoded(found))

    async def has_news(self, partition: int, consultation: str, after: int) -> bool:
        """Return whether some replica has a message of the consultation behind *after*: cheap, and perhaps late.

        Raises:
            LogUnavailableError: no answer.
        """
        subject = stored_subject(partition, consultation)
        return await self._api.get_message(STREAM, after + 1, next_of=subject) is not None

    async def tail(self, partition: int, consultation: str, after: int, last: int) -> AsyncIterator[Numbered]:
        """Yield each message of the consultation behind *after* up to *last*, which the leader told.

        Raises:
            LogUnavailableError: no answer.
        """
        subject, position = stored_subject(partition, consultation), after
        while position < last:
            batch = await self._batch(subject, position + 1)
            if not batch:
                break
            for message in batch:
                position = int((message.headers or {})["Nats-Sequence"])
                yield position, _event(subject, message.headers, message.data)
        while position < last:  # the replica that answered lags, or what it sends gets lost
            found = await self._leaders({"seq": position + 1, "next_by_subj": subject})
            if found is None:  # trimmed meanwhile
                return
            position = int(found["seq"])
            yield position, await self._decoded(found)

    async def _leaders(self, wanted: dict[str, object]) -> dict[str, str] | None:
        try:
            answer = await self._api.request(f"STREAM.MSG.GET.{STREAM}", wanted)
        except ApiError as error:
            if error.err_code == _NO_MESSAGE:
                return None
            raise
        message: dict[str, str] = answer["message"]
        return message

    async def _decoded(self, found: dict[str, str]) -> Event | None:
        headers = await self._nc._process_headers(b64decode(found.get("hdrs", "")))
        return _event(found["subject"], headers, b64decode(found.get("data", "")))

    async def _batch(self, subject: str, start: int) -> list[Msg]:
        """Return some messages of *subject* from *start* on, as one replica has them; none when it has none."""
        for _ in range(_TRIES):
            batch, whole = await self._answers(subject, start)
            if batch or whole:
                return batch
        return []

    async def _answers(self, subject: str, start: int) -> tuple[list[Msg], bool]:
        """Ask for a batch; return its messages up to the first that was lost on its way, and whether none was."""
        wanted = {"seq": start, "next_by_subj": subject, "batch": BATCH_MESSAGES, "max_bytes": BATCH_BYTES}
        batch: list[Msg] = []
        before = "0"
        try:
            async with asyncio.timeout(self._timeout), self._inbox() as (inbox, answers):
                await self._nc.publish(_DIRECT_GET, orjson.dumps(wanted), reply=inbox)
                while True:
                    message = await answers.get()
                    headers = message.headers or {}
                    status = headers.get("Status")
                    if status == "404":
                        return batch, True
                    if status not in (None, "204"):
                        raise LogUnavailableError(f"DIRECT.GET.{STREAM}: status {status}")
                    if headers.get("Nats-Last-Sequence") != before:
                        return batch, False
                    if status == "204":
                        return batch, True
                    before = headers["Nats-Sequence"]
                    batch.append(message)
        except TimeoutError:
            must_hear(self._nc)
            raise LogUnavailableError(f"DIRECT.GET.{STREAM}: no answer within {self._timeout:g} s") from None
        except (nats.errors.Error, OSError) as error:
            raise LogUnavailableError(f"DIRECT.GET.{STREAM}: {type(error).__name__}") from error

    @asynccontextmanager
    async def _inbox(self) -> AsyncIterator[tuple[str, asyncio.Queue[Msg]]]:
        answers: asyncio.Queue[Msg] = asyncio.Queue()
        inbox = self._nc.new_inbox()
        subscription = await self._nc.subscribe(inbox, cb=answers.put)
        try:
            yield inbox, answers
        finally:
            if not self._nc.is_closed:
                await subscription.unsubscribe()


def _event(subject: str, headers: dict[str, str] | None, body: bytes) -> Event | None:
    try:
        return decode(subject.rpartition(".")[2], headers, body)
    except PoisonError:  # the persister sets it aside
        return None
