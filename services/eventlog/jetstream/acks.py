"""Reads what JetStream answers to a published message (PubAck, ADR-1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from services.eventlog.errors import LogFullError, LogRefusedError
from services.eventlog.jetstream.api import is_transient
from services.eventlog.protocol import Appended

#: the same message id is being stored just now
DUPLICATE_IN_FLIGHT = 10158
#: an atomic batch holds a message id that the stream knows, or one of them twice: nothing of it was stored
BATCH_HAS_DUPLICATE = 10201
#: an atomic batch lost its beginning in a change of leaders, or the stream has as many batches under way as it takes
_BATCH_LATER = frozenset({10176, 10210})

#: generic failure to store; its text tells a stream at its limit from anything else
_STORE_FAILED = 10077
#: the account's or the server's storage is used up
_NO_STORAGE = frozenset({10002, 10047})


@dataclass(frozen=True, slots=True)
class Again:
    """The message was not stored, or nobody knows, and may be sent again with the same id.

    Attributes:
        reason: for operators.
        err_code: the broker's, or 0.
    """

    reason: str
    err_code: int = 0


def read_ack(data: bytes, headers: Mapping[str, str] | None, stream: str) -> Appended | Again:
    """Return what the answer says about the message.

    Args:
        data: body of the answer.
        headers: of the answer, or None; a status is there when nobody took the message.
        stream: that must have stored it.

    Raises:
        LogFullError: the stream is at its limit.
        LogRefusedError: the broker refuses for good, or another stream or service answered.
    """
    ack = _read(data, headers, stream)
    return ack if isinstance(ack, Again) else Appended(int(ack["seq"]), bool(ack.get("duplicate", False)))


def read_batch_ack(data: bytes, headers: Mapping[str, str] | None, stream: str, count: int) -> list[Appended] | Again:
    """Return what the answer to the last message of an atomic batch of *count* says about all of them (ADR-50).

    The broker names the last position; those before it are consecutive, whatever others publish meanwhile. An
    :class:`Again` with the code :data:`BATCH_HAS_DUPLICATE` is about the messages: the same batch would get it again.

    Raises:
        LogFullError, LogRefusedError: as of :func:`read_ack`; nothing of the batch was stored.
    """
    ack = _read(data, headers, stream)
    if isinstance(ack, Again):
        return ack
    if ack.get("count") != count:
        raise LogRefusedError(f"the broker stored {ack.get('count')!r} messages of a batch of {count}")
    last = int(ack["seq"])
    return [Appended(sequence, duplicate=False) for sequence in range(last - count + 1, last + 1)]


def _read(data: bytes, headers: Mapping[str, str] | None, stream: str) -> dict[str, Any] | Again:
    if headers is not None and "Status" in headers:
        return Again(f"no node leads the stream just now (status {headers['Status']})")
    try:
        ack = orjson.loads(data)
    except orjson.JSONDecodeError:
        ack = None
    if not isinstance(ack, dict):
        raise LogRefusedError("the answer to a publish is no JetStream acknowledgement: another service is listening")
    if "error" in ack:
        return _read_error(ack["error"])
    if ack.get("stream") != stream:
        raise LogRefusedError(f"stream {ack.get('stream')!r} took a message of {stream}: its subjects overlap")
    return ack


def _read_error(error: Mapping[str, object]) -> Again:
    code, err_code = int(str(error.get("code", 0))), int(str(error.get("err_code", 0)))
    text = f"{error.get('description', 'no description')} (err_code {err_code})"
    if err_code in _NO_STORAGE or (err_code == _STORE_FAILED and "maximum" in text):
        raise LogFullError(f"the stream is full: {text}")
    if is_transient(code, err_code) or err_code in _BATCH_LATER or err_code == BATCH_HAS_DUPLICATE:
        return Again(text, err_code)
    raise LogRefusedError(f"the broker refuses the message: {text}")
