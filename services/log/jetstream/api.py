"""Requests to the JetStream API, as they are on the wire (nats-io ADR-1).

nats-py's own manager sends no ``action`` with a consumer and does not know ``allow_atomic``, so the JSON is ours. An
error answer becomes an :class:`ApiError`, whose second base says what happens next.
"""

from __future__ import annotations

import asyncio
from base64 import b64decode
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NotRequired, TypedDict

import nats.errors
import orjson
from nats.aio.msg import Msg
from nats.js.api import Header

from fiq.errors import FiqError
from services.core.retry import backoff
from services.log.errors import LogRefusedError, LogUnavailableError
from services.log.jetstream.connection import Connection

#: error codes (``err_code``) of the broker after which the same request may succeed
TRANSIENT_ERR_CODES = frozenset({10004, 10007, 10008, 10009, 10023, 10077, 10158, 10167})
#: JetStream is switched off on the server, or for the account
NOT_ENABLED_ERR_CODES = frozenset({10039, 10076})

STREAM_NOT_FOUND = 10059
CONSUMER_NOT_FOUND = 10014
MESSAGE_NOT_FOUND = 10037
SEQUENCE_NOT_FOUND = 10043

#: how long an answer may take, seconds
REQUEST_TIMEOUT_SECONDS = 5.0
#: what only reads is asked again after so long without an answer, then after twice that, and so on, seconds
AGAIN_SECONDS = 0.5

#: requests that change nothing
_READS = ("STREAM.INFO.", "STREAM.MSG.GET.", "DIRECT.GET.", "CONSUMER.INFO.", "CONSUMER.NAMES.")


class ApiError(FiqError):
    """Raised when the broker answers a request with an error; also a LogUnavailableError or a LogRefusedError.

    Attributes:
        code: like an HTTP status.
        err_code: the broker's own code, from nats-server's ``server/errors.json``.
        description: the broker's text.
    """

    def __init__(self, operation: str, code: int, err_code: int, description: str) -> None:
        super().__init__(f"{operation}: {description} (code {code}, err_code {err_code})")
        self.code = code
        self.err_code = err_code
        self.description = description


class TransientApiError(ApiError, LogUnavailableError):
    """Raised when the broker cannot just now; the same request may succeed later."""


class PermanentApiError(ApiError, LogRefusedError):
    """Raised when the broker would refuse the same request again."""


class NoRespondersError(LogUnavailableError):
    """Raised when no server answers for the JetStream API: it is off, or the user may not call it."""


class StoredMessage(TypedDict):
    """One message as the stream holds it; *subject* with the partition, *time* RFC 3339 in UTC.

    *pending*: how many messages of the subject asked for come after it, when they were counted.
    """

    subject: str
    seq: int
    time: str
    headers: dict[str, str]
    data: bytes
    pending: NotRequired[int]


class JetStreamApi:
    """The JetStream API on a connection; each answer may take *timeout* seconds unless a request says otherwise."""

    def __init__(self, nc: Connection, *, timeout: float = REQUEST_TIMEOUT_SECONDS) -> None:
        self._nc = nc
        self._timeout = timeout

    async def request(
        self, suffix: str, body: Mapping[str, Any] | None = None, *, timeout: float | None = None
    ) -> dict[str, Any]:
        """Send *body* to ``$JS.API.<suffix>`` and return the answer.

        Raises ApiError: the broker answered with an error; NoRespondersError: no server answers for the API;
        LogUnavailableError: no answer within *timeout* seconds, or no connection; the request may still have taken
        effect (creations with three replicas often do).
        """
        message = await self._ask(suffix, body, timeout)
        return _answer(suffix, message.data)

    async def stream_info(self, name: str) -> dict[str, Any] | None:
        """Return the stream's configuration and state, or None when there is no such stream."""
        try:
            return await self.request(f"STREAM.INFO.{name}")
        except ApiError as error:
            if error.err_code == STREAM_NOT_FOUND:
                return None
            raise

    async def consumer_info(self, stream: str, consumer: str) -> dict[str, Any] | None:
        """Return the consumer's configuration and state, or None when the stream has no such consumer."""
        try:
            return await self.request(f"CONSUMER.INFO.{stream}.{consumer}")
        except ApiError as error:
            if error.err_code == CONSUMER_NOT_FOUND:
                return None
            raise

    async def consumer_names(self, stream: str) -> list[str]:
        """Return the names of all consumers of *stream*; the meta leader knows them, no consumer is waited for."""
        found: list[str] = []
        while True:
            page = await self.request(f"CONSUMER.NAMES.{stream}", {"offset": len(found)})
            found += page.get("consumers") or []
            if not page.get("consumers") or len(found) >= page.get("total", 0):
                return found

    async def delete_consumer(self, stream: str, consumer: str, *, timeout: float | None = None) -> None:
        """Delete *consumer*; it is fine when there is none.

        Raises LogUnavailableError: no answer, as when its node is dead; it may be deleted all the same.
        """
        try:
            await self.request(f"CONSUMER.DELETE.{stream}.{consumer}", timeout=timeout)
        except ApiError as error:
            if error.err_code != CONSUMER_NOT_FOUND:
                raise

    async def create_consumer(
        self, stream: str, config: Mapping[str, Any], *, timeout: float | None = None
    ) -> dict[str, Any]:
        """Create the consumer that *config* describes, and return its info.

        When it exists that succeeds only if every field agrees; else the error's ``err_code`` is 10148.
        """
        suffix = f"CONSUMER.CREATE.{stream}.{config['name']}.{config['filter_subject']}"
        request = {"stream_name": stream, "config": dict(config), "action": "create"}
        return await self.request(suffix, request, timeout=timeout)

    async def purge(self, stream: str, sequence: int, *, only: str | None = None) -> int:
        """Delete what is below *sequence* and of the subjects *only*; return how many messages that were.

        Raises LogUnavailableError: no connection, or no answer. It may have taken effect, but never takes effect after
        a reconnect: the client keeps what it could not send, and by then less may have to go.
        """
        suffix = f"STREAM.PURGE.{stream}"
        wanted = {"seq": sequence} if only is None else {"seq": sequence, "filter": only}
        if not self._nc.is_connected:
            raise LogUnavailableError(f"{suffix}: no connection")
        try:
            return int((await self.request(suffix, wanted)).get("purged", 0))
        finally:
            self._nc.drop_unsent(f"PUB $JS.API.{suffix} ")

    async def delete_message(self, stream: str, sequence: int) -> bool:
        """Delete the message at *sequence* and overwrite it on every node's disk; return False when there is none.

        Raises LogUnavailableError: no answer; it may be deleted all the same.
        """
        try:
            await self.request(f"STREAM.MSG.DELETE.{stream}", {"seq": sequence, "no_erase": False})
        except ApiError as error:
            if error.err_code in {MESSAGE_NOT_FOUND, SEQUENCE_NOT_FOUND} or "no message found" in error.description:
                return False
            raise
        return True

    async def get_message(
        self, stream: str, sequence: int, *, next_of: str | None = None, counted: bool = False
    ) -> StoredMessage | None:
        """Return the message at *sequence*, or None when the stream holds none there.

        With *next_of*, a subject with or without wildcards, return the first one of it from *sequence* on. A direct get
        (ADR-31): any replica answers, so one that lags may not have the newest messages yet. *counted* says how many
        follow it.
        """
        operation = f"DIRECT.GET.{stream}"
        wanted: dict[str, Any] = {"seq": sequence} if next_of is None else {"seq": sequence, "next_by_subj": next_of}
        if counted:  # only a batched get counts; a second answer, which ends the batch of one, is not awaited
            wanted["batch"] = 1
        message = await self._ask(operation, wanted, None)
        headers = message.headers or {}
        if "Nats-Sequence" not in headers:  # a stored message, too, may say "Status"
            status = headers.get("Status", "")
            if status == "404":
                return None
            raise PermanentApiError(
                operation, int(status) if status.isdecimal() else 0, 0, headers.get(Header.DESCRIPTION, "refused")
            )
        own = {key: value for key, value in headers.items() if key not in _DIRECT_GET_HEADERS}
        return StoredMessage(
            subject=headers["Nats-Subject"],
            seq=int(headers["Nats-Sequence"]),
            time=headers["Nats-Time-Stamp"],
            headers=own,
            data=message.data,
            pending=int(headers.get("Nats-Num-Pending", 0)),
        )

    async def leader_message(
        self, stream: str, sequence: int, *, next_of: str | None = None, timeout: float | None = None
    ) -> StoredMessage | None:
        """Do as :meth:`get_message`, but ask the stream's leader, which has all that was acknowledged.

        One that was elected just now may not have applied all of it yet, and a deposed one may not know that it is.
        """
        wanted: dict[str, Any] = {"seq": sequence} if next_of is None else {"seq": sequence, "next_by_subj": next_of}
        return await self._leaders(stream, wanted, timeout)

    async def last_message(self, stream: str, subject: str, *, timeout: float | None = None) -> StoredMessage | None:
        """Return the last message of *subject* as the stream's leader has it; None when there is none."""
        return await self._leaders(stream, {"last_by_subj": subject}, timeout)

    async def _leaders(self, stream: str, wanted: Mapping[str, Any], timeout: float | None) -> StoredMessage | None:
        try:
            message = (await self.request(f"STREAM.MSG.GET.{stream}", wanted, timeout=timeout))["message"]
        except ApiError as error:
            if error.err_code == MESSAGE_NOT_FOUND:
                return None
            raise
        headers = await self._nc.parse_headers(b64decode(message.get("hdrs", "")))
        return StoredMessage(
            subject=message["subject"],
            seq=int(message["seq"]),
            time=message["time"],
            headers=headers,
            data=b64decode(message.get("data", "")),
        )

    async def _ask(self, suffix: str, body: Mapping[str, Any] | None, timeout: float | None) -> Msg:
        payload = b"" if body is None else orjson.dumps(body)
        timeout = self._timeout if timeout is None else timeout
        again = AGAIN_SECONDS if suffix.startswith(_READS) else timeout
        try:
            return await self._first_answer(f"$JS.API.{suffix}", payload, timeout, again)
        except nats.errors.NoRespondersError:
            raise NoRespondersError(f"{suffix}: no server answers for the JetStream API") from None
        except TimeoutError:
            raise LogUnavailableError(f"{suffix}: no answer within {timeout:g} s") from None
        except (nats.errors.Error, OSError) as error:
            raise LogUnavailableError(f"{suffix}: {type(error).__name__}") from error

    async def _first_answer(self, subject: str, payload: bytes, timeout: float, again: float) -> Msg:
        """Ask until an answer comes: nodes say nothing while they elect a leader, also that of a new stream.

        Raises TimeoutError: none came within *timeout* seconds.
        """
        asked: list[asyncio.Task[Msg]] = []
        try:
            async with asyncio.timeout(timeout):
                for pause in backoff(again, timeout):
                    asked.append(asyncio.create_task(self._nc.request(subject, payload, timeout=2 * timeout)))
                    done, _ = await asyncio.wait(asked, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
                    if done:
                        return done.pop().result()
            raise AssertionError("backoff never ends")
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)


@asynccontextmanager
async def inbox(nc: Connection) -> AsyncIterator[tuple[str, asyncio.Queue[Msg]]]:
    """Receive many answers to one request: yield a subject to name as *reply*, and the queue into which they come.

    Raises nats.errors.Error, OSError: there is no connection.
    """
    answers: asyncio.Queue[Msg] = asyncio.Queue()
    subject = nc.new_inbox()
    subscription = await nc.subscribe(subject, cb=answers.put)
    try:
        yield subject, answers
    finally:
        if not nc.is_closed:
            await subscription.unsubscribe()


#: what the server adds to a message in a direct get
_DIRECT_GET_HEADERS = frozenset(
    {"Nats-Stream", "Nats-Subject", "Nats-Sequence", "Nats-Time-Stamp", "Nats-Num-Pending", "Nats-Last-Sequence"}
)


def _answer(operation: str, data: bytes) -> dict[str, Any]:
    try:
        answer = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise PermanentApiError(operation, 0, 0, "the answer is no JSON: is another service on this subject?") from None
    error = answer.get("error")
    if error is None:
        return dict(answer)
    raise api_error(operation, error)


def api_error(operation: str, error: Mapping[str, Any]) -> ApiError:
    """Build the exception that belongs to the ``error`` object of an answer."""
    code, err_code = int(error.get("code", 0)), int(error.get("err_code", 0))
    kind = TransientApiError if is_transient(code, err_code) else PermanentApiError
    return kind(operation, code, err_code, str(error.get("description", "no description")))


def is_transient(code: int, err_code: int) -> bool:
    """Tell whether the same request may succeed later.

    A 503 that is not in the list of known codes counts as transient, except for JetStream being switched off.
    """
    return err_code in TRANSIENT_ERR_CODES or (code == 503 and err_code not in NOT_ENABLED_ERR_CODES)
