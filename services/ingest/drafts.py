"""What one event says of itself before anybody has looked at the path and the headers: its draft."""

from __future__ import annotations

from typing import Any, NamedTuple
from uuid import UUID

from services.contract.errors import InvalidIdError
from services.contract.event import InvalidBodyError, read_body
from services.contract.ids import check_consultation_id, event_id_from_key


class Draft(NamedTuple):
    """One event.

    Attributes:
        body: as it is stored.
        consultation: the consultation that it names, or None.
        event_id: the id that it brings with it, or None.
    """

    body: bytes
    consultation: str | None
    event_id: UUID | None


def read_line(raw: bytes) -> Draft:
    """Read an event of a batch: its top-level members ``consultation_id`` and ``event_id`` say where it belongs.

    Raises:
        PoisonError: it is no event, or one of the two is not what it should be. The message quotes nothing of it.
    """
    body, document = read_body(raw)
    consultation = _text(document, "consultation_id")
    if consultation is not None:
        check_consultation_id(consultation)
    key = _text(document, "event_id")
    try:
        return Draft(body, consultation, None if key is None else event_id_from_key(key))
    except InvalidIdError:
        raise InvalidBodyError("event_id is 1 to 255 visible ASCII characters") from None


def _text(document: dict[str, Any], name: str) -> str | None:
    value = document.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidBodyError(f"{name} is a string")
    return value
