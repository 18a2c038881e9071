"""A dead letter: what a persister writes into ``fi-dead`` when it cannot store a message, and what it tells a reader.

Its body is the message's body. Its headers say why it was set aside, where the message was in the log, and what the
headers of the message were, so that it can go back into the log under the same id. Headers may hold anything, so only
printable ASCII is copied, up to a length; :data:`ALTERED_HEADER` names what was changed by that. A letter with an
altered header or a cut body is not what was posted, and can be looked at only.

Another kind of letter lists *conflicts*: events under used ids, which the partition files keep under ``/conflicts``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import orjson

from fiq.errors import PoisonError
from fiq.event import (
    MESSAGE_ID_HEADER,
    PARENT_HEADER,
    RECEIVED_HEADER,
    STATE_HEADER,
    Event,
    check_consultation_id,
    decode,
    trace_of_message,
)

#: header: why the message could not be written
REASON_HEADER = "Fi-Reason"
#: header: its position in ``fi-events``
SEQUENCE_HEADER = "Fi-Stream-Sequence"
#: header: the consultation's token of its subject
CONSULTATION_HEADER = "Fi-Consultation"
#: header: the message id it had
ORIGINAL_ID_HEADER = "Fi-Original-Msg-Id"
#: header: number of events in a list of conflicts
LISTED_HEADER = "Fi-Listed"
#: header: original size of a body that was too long and was cut, bytes
CUT_HEADER = "Fi-Cut-From-Bytes"
#: header: names of the copied headers that are not what the message had, separated by commas
ALTERED_HEADER = "Fi-Altered"

#: more than the headers of a dead letter take, bytes
HEADERS_BYTES = 4096
#: longest copy of a value, characters: a tracestate has up to 512
MAX_COPIED = 512
#: headers that are copied under their own names
_KEPT = (RECEIVED_HEADER, PARENT_HEADER, STATE_HEADER)
_CONFLICTS = (
    "events under message ids that their consultations hold with another body: [sequence, sequence of the one that "
    "holds the id]; the partition file keeps them under /conflicts/<consultation>"
)
#: more than an event takes in a list of conflicts, bytes
_ENTRY_BYTES = 256


@dataclass(frozen=True, slots=True, order=True)
class Listed:
    """An event that a list of conflicts names: of *consultation*, at *sequence*, whose id the one at *first* holds."""

    consultation: str
    sequence: int
    first: int


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A dead letter, as a reader finds it.

    Attributes:
        sequence: its own, in the log of dead letters.
        stored: when it was set aside, RFC 3339 in UTC.
        partition: of the message.
        reason: why it was set aside.
        position: sequence of the message in the log of events; 0 if the letter does not say.
        consultation: of the message, as far as it is known; may be malformed.
        message_id: of the message, as far as it is known; may be malformed.
        trace_id: of the request that brought it; empty when it is not known.
        listed: number of conflicts in a list of them; 0 for a message.
        size: of the body, bytes.
        body: empty in a page.
        event: what can go back into the log; None for a list, and for what ingest would not have written like this.
        obstacle: why it cannot go back; empty when it can.
    """

    sequence: int
    stored: str
    partition: int
    reason: str
    position: int
    consultation: str
    message_id: str
    trace_id: str
    listed: int
    size: int
    body: bytes
    event: Event | None
    obstacle: str

    def conflicts(self) -> list[Listed]:
        """Return what a list of conflicts names; what is malformed is left out."""
        found = []
        for line in self.body.splitlines() if self.listed else ():
            try:
                document = orjson.loads(line)
                consultation = check_consultation_id(document["consultation_id"])
                found += [Listed(consultation, int(at), int(first)) for at, first in document["conflicts"]]
            except (orjson.JSONDecodeError, PoisonError, KeyError, TypeError, ValueError):
                continue
        return found


def message_headers(
    letter_id: str, sequence: int, consultation: str, headers: Mapping[str, str] | None, reason: str
) -> dict[str, str]:
    """Return the headers of the letter about a message of *consultation* at *sequence* that had *headers*."""
    had = headers or {}
    made = {MESSAGE_ID_HEADER: letter_id, REASON_HEADER: reason, SEQUENCE_HEADER: str(sequence)}
    altered = []
    copies = [(CONSULTATION_HEADER, consultation), (ORIGINAL_ID_HEADER, had.get(MESSAGE_ID_HEADER, ""))]
    for name, value in [*copies, *((name, had[name]) for name in _KEPT if name in had)]:
        printable = "".join(c for c in value[:MAX_COPIED] if " " <= c <= "~").strip()
        if printable:
            made[name] = printable
        if printable != value:
            altered.append(name)
    return made | ({ALTERED_HEADER: ",".join(altered)} if altered else {})


def conflict_letters(
    log_id: str, conflicts: Sequence[tuple[str, int, int]], most_bytes: int
) -> list[tuple[bytes, dict[str, str]]]:
    """Return body and headers of the letters that list *conflicts*: consultation, sequence, and sequence of the first.

    Each has about *most_bytes* at most.
    """
    letters = []
    most = max(1, most_bytes // _ENTRY_BYTES)
    for part in (conflicts[start : start + most] for start in range(0, len(conflicts), most)):
        by_consultation: dict[str, list[tuple[int, int]]] = {}
        for consultation, sequence, first in part:
            by_consultation.setdefault(consultation, []).append((sequence, first))
        lines = [orjson.dumps({"consultation_id": one, "conflicts": at}) for one, at in by_consultation.items()]
        headers = {
            MESSAGE_ID_HEADER: f"{log_id}/{part[0][1]}-{part[-1][1]}",
            REASON_HEADER: _CONFLICTS,
            SEQUENCE_HEADER: str(part[0][1]),
            LISTED_HEADER: str(len(part)),
        }
        letters.append((b"\n".join(lines), headers))
    return letters


def read_letter(sequence: int, stored: str, subject: str, headers: Mapping[str, str], body: bytes) -> DeadLetter:
    """Return the letter in a message of ``fi-dead``, whoever wrote it."""
    listed = _number(headers.get(LISTED_HEADER, ""))
    event, obstacle = None, "it lists events that HDF5 keeps under /conflicts: post what is missing under a new key"
    if not listed:
        event, obstacle = _event(headers, body)
    trace = trace_of_message(headers)
    return DeadLetter(
        sequence=sequence,
        stored=stored,
        partition=_number(subject.rpartition(".")[2]),
        reason=headers.get(REASON_HEADER, ""),
        position=_number(headers.get(SEQUENCE_HEADER, "")),
        consultation=headers.get(CONSULTATION_HEADER, ""),
        message_id=headers.get(ORIGINAL_ID_HEADER, ""),
        trace_id="" if trace is None else trace.trace_id,
        listed=listed,
        size=len(body),
        body=body,
        event=event,
        obstacle=obstacle,
    )


def _event(headers: Mapping[str, str], body: bytes) -> tuple[Event | None, str]:
    """Return the event of a letter, or why it is none."""
    if CUT_HEADER in headers:
        return None, "its body was cut, because it was too long for a dead letter"
    if ALTERED_HEADER in headers:
        return None, f"the message had other values in {headers[ALTERED_HEADER]}"
    original = {name: headers[name] for name in _KEPT if name in headers}
    if ORIGINAL_ID_HEADER in headers:
        original[MESSAGE_ID_HEADER] = headers[ORIGINAL_ID_HEADER]
    try:
        return decode(headers.get(CONSULTATION_HEADER, ""), original, body), ""
    except PoisonError as error:
        return None, f"it would be set aside again: {error}"


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 19 else 0
