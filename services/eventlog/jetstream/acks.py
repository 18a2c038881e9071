"""Reads what JetStream answers to a published message (PubAck, ADR-1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import orjson

from services.eventlog.errors import LogFullError, LogRefusedError
from services.eventlog.jetstream.api import is_transient
from services.eventlog.protocol import Appended

#: the same message id is being stored just now
DUPLICATE_IN_FLIGHT = 10158

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
    return Appended(int(ack["seq"]), bool(ack.get("duplicate", False)))


def _read_error(error: Mapping[str, object]) -> Again:
    code, err_code = int(str(error.get("code", 0))), int(str(error.get("err_code", 0)))
    text = f"{error.get('description', 'no description')} (err_code {err_code})"
    if err_code in _NO_STORAGE or (err_code == _STORE_FAILED and "maximum" in text):
        raise LogFullError(f"the stream is full: {text}")
    if is_transient(code, err_code):
        return Again(text, err_code)
    raise LogRefusedError(f"the broker refuses the message: {text}")
