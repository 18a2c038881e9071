"""The service's answers as typed records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import orjson

#: type of a problem if an answer is not a problem document
_NO_DOCUMENT = "about:blank"
#: media type of an error (RFC 9457)
PROBLEM_TYPE = "application/problem+json"


@dataclass(frozen=True, slots=True)
class BadLine:
    """A refused event of a batch: its number, from 1, and the reason."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a request failed.

    Attributes:
        type: decide by it; ``about:blank`` if the answer was not a problem document.
        status: of the answer.
        title: the same for every problem of the type.
        detail: of this problem; quotes nothing of the request.
        lines: the refused events of a batch.
    """

    type: str
    status: int
    title: str = ""
    detail: str = ""
    lines: tuple[BadLine, ...] = ()

    @classmethod
    def of(cls, status: int, media_type: str, body: bytes) -> Problem:
        """Read an answer; of a body that is not a problem document only the status is used."""
        if media_type == PROBLEM_TYPE:
            try:
                found = orjson.loads(body)
                lines = tuple(BadLine(int(line["line"]), str(line["reason"])) for line in found.get("lines", ()))
                return cls(str(found["type"]), status, str(found["title"]), str(found["detail"]), lines)
            except (ValueError, TypeError, KeyError, AttributeError):
                pass  # truncated, or another kind of document: the status is enough
        return cls(_NO_DOCUMENT, status)

    @property
    def is_document(self) -> bool:
        """Whether the answer was a problem document."""
        return self.type != _NO_DOCUMENT

    def __str__(self) -> str:
        """Describe it on one line."""
        text = self.detail or self.title
        return f"{self.status} {self.type}: {text}" if text else f"status {self.status}"


@dataclass(frozen=True, slots=True)
class Accepted:
    """An event that the log has stored.

    Attributes:
        consultation: of the event.
        message_id: the event's id, in the log and in HDF5.
        sequence: its position in the stream.
        duplicate: whether it was stored before, by an earlier request with the same key.
    """

    consultation: str
    message_id: UUID
    sequence: int
    duplicate: bool

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Accepted:
        """Read one result of a 202.

        Raises:
            ValueError, TypeError, KeyError: it is not one.
        """
        sequence = result["sequence"]
        if not isinstance(sequence, int):
            raise TypeError("sequence")
        duplicate = result.get("duplicate", False) is True
        return cls(str(result["consultation_id"]), UUID(result["message_id"]), sequence, duplicate)


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event, read back.

    Attributes:
        consultation: of the event.
        message_id: the event's id.
        sequence: its position in the stream, which orders the events of a consultation.
        persisted: whether it is in HDF5; until then it is safe in the stream. False where the service does not say it.
        received: when the service received it, ISO 8601 in UTC with nanoseconds.
        written: when the persister wrote it into HDF5, in the same form; None unless *persisted*.
        event: as it was posted.
    """

    consultation: str
    message_id: UUID
    sequence: int
    persisted: bool
    received: str
    written: str | None
    event: dict[str, Any]

    @classmethod
    def of(cls, consultation: str, record: Mapping[str, Any]) -> StoredEvent:
        """Read one event of an answer about *consultation*.

        Raises:
            ValueError, TypeError, KeyError: it is not one.
        """
        sequence, event = record["sequence"], record["event"]
        if not isinstance(sequence, int) or not isinstance(event, dict):
            raise TypeError("sequence, event")
        persisted = record.get("status") == "persisted"
        written = str(record["written"]) if persisted else None
        message_id, received = UUID(record["message_id"]), str(record["received"])
        return cls(consultation, message_id, sequence, persisted, received, written, event)


@dataclass(frozen=True, slots=True)
class ConsultationSummary:
    """A consultation in the list of all.

    Attributes:
        consultation: its id.
        events: how many of its events are in HDF5.
        first_received: when the service received the first one, ISO 8601 in UTC with nanoseconds.
        last_received: when it received the last one.
    """

    consultation: str
    events: int
    first_received: str
    last_received: str

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> ConsultationSummary:
        """Read one consultation of an answer.

        Raises:
            TypeError, KeyError: it is not one.
        """
        events = record["events"]
        if not isinstance(events, int):
            raise TypeError("events")
        return cls(str(record["consultation_id"]), events, str(record["first_received"]), str(record["last_received"]))
