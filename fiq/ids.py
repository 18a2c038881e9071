"""Ids: the consultation, the event, the message id of the broker.

A consultation id is one NATS subject token and one HDF5 link name at once. An event id is a UUID, 16 bytes in HDF5:
the client's idempotency key where that is a UUID already, a UUIDv8 (RFC 9562, section 5.8) derived from any other key,
a UUIDv7 (section 5.7) made here where the client sends none.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from uuid import UUID

from fiq.errors import InvalidIdError

#: the form of a consultation id
CONSULTATION_ID = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)

#: an idempotency key
_VISIBLE_ASCII = re.compile(r"[\x21-\x7e]{1,255}", re.ASCII)
_CANONICAL_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)


def check_consultation_id(value: str) -> str:
    """Return *value* when it is a consultation id.

    Raises InvalidIdError: it is empty, longer than 128 characters, or holds another character than ``[A-Za-z0-9_-]``.
    """
    if CONSULTATION_ID.fullmatch(value) is None:
        raise InvalidIdError("a consultation id is 1 to 128 characters of A-Z a-z 0-9 _ -")
    return value


def event_id_from_key(key: str) -> UUID:
    """Derive the event id from an idempotency *key*: the same key always gives the same id.

    A key that is a UUID in its canonical lower-case form is the id itself. Any other becomes a UUIDv8 over its
    SHA-256, so that two keys share an id only when 122 bits of the digest agree.

    Args:
        key: the value of ``Idempotency-Key``, quoted (a structured-field string, as the IETF draft
            draft-ietf-httpapi-idempotency-key-header has it) or bare; 1 to 255 visible ASCII characters.

    Raises InvalidIdError: the key is empty, too long, or holds white space or other than visible ASCII characters.
    """
    bare = bare_key(key)
    if _CANONICAL_UUID.fullmatch(bare) is not None:
        return UUID(bare)
    return _derived(b"fiq idempotency key", bare.encode("ascii"))


def bare_key(key: str) -> str:
    """Return an idempotency *key* without the quotes that it may have.

    Raises InvalidIdError: as of :func:`event_id_from_key`.
    """
    bare = _unquote(key)
    if _VISIBLE_ASCII.fullmatch(bare) is None:
        raise InvalidIdError("an idempotency key is 1 to 255 visible ASCII characters, quoted or not")
    return bare


def event_id_of_line(key: str, line: int) -> UUID:
    """Derive the event id of a line of a batch that was sent under *key*: the one of the key ``<key>:<line>``.

    Args:
        key: of the batch, without quotes, as :func:`bare_key` returns it.
        line: its number, from 1.
    """
    return _derived(b"fiq idempotency key", f"{key}:{line}".encode("ascii"))


def event_id_of_cloudevent(source: str, identifier: str) -> UUID:
    """Derive the event id of a CloudEvent: a UUIDv8 over *source* and *identifier*, the pair that is unique."""
    length = len(source.encode())
    return _derived(b"fiq cloudevent", f"{length}:{source}{identifier}".encode())


def new_event_id() -> UUID:
    """Make a UUIDv7: 48 bits of Unix time in milliseconds, then 74 random bits."""
    milliseconds = time.time_ns() // 1_000_000
    return _uuid(milliseconds.to_bytes(6, "big") + os.urandom(10), version=7)


def message_id(consultation: str, event_id: UUID) -> str:
    """Return the broker's message id (``Nats-Msg-Id``): ``<consultation>/<event id>``."""
    return f"{consultation}/{event_id}"


def event_id_from_message_id(value: str, consultation: str) -> UUID:
    """Return the event id of a broker's message id that must belong to *consultation*.

    Raises InvalidIdError: the message id names another consultation, or its second part is no canonical UUID.
    """
    owner, separator, event = value.partition("/")
    if not separator or owner != consultation or _CANONICAL_UUID.fullmatch(event) is None:
        raise InvalidIdError("a message id is <consultation id>/<lower-case UUID> of the subject's consultation")
    return UUID(event)


def _unquote(key: str) -> str:
    if len(key) >= 2 and key[0] == key[-1] == '"':
        return re.sub(r"\\([\\\"])", r"\1", key[1:-1])
    return key


def _derived(kind: bytes, name: bytes) -> UUID:
    return _uuid(hashlib.sha256(kind + b"\0" + name).digest()[:16], version=8)


def _uuid(raw: bytes, *, version: int) -> UUID:
    number = int.from_bytes(raw, "big")
    number = number & ~(0xF << 76) | version << 76
    number = number & ~(0x3 << 62) | 0x2 << 62
    return UUID(int=number)
