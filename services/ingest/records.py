"""How stored events are shown: as records or as CloudEvents, one JSON object each, in pages and in streams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import orjson

from fiq.json_text import slice_object
from services.ingest.formats import is_cloudevent
from services.log.protocol import SequencedEvent
from services.log.questions import StoredConsultation

JSON, NDJSON = "application/json", "application/x-ndjson"
EVENT_STREAM, HTML = "text/event-stream", "text/html"
CLOUDEVENT, CLOUDEVENT_BATCH = "application/cloudevents+json", "application/cloudevents-batch+json"


def record(stored: SequencedEvent, *, bodies: bool = True, consultation: bool = False, status: bool = True) -> bytes:
    """Return an event as a JSON object in one line.

    Args:
        stored: the event.
        bodies: with its body, byte for byte; otherwise with its type and length.
        consultation: with the id of its consultation.
        status: with whether it is persisted, and when.
    """
    event = stored.event
    owner = f'"consultation_id":"{event.consultation}",' if consultation else ""
    if stored.written_ns is None:
        state = ',"status":"queued","written":null'
    else:
        state = f',"status":"persisted","written":"{rfc3339(stored.written_ns)}"'
    head = (
        f'{{{owner}"sequence":{stored.sequence},"message_id":"{event.event_id}",'
        f'"received":"{rfc3339(event.received_ns)}"{state if status else ""}'
    )
    if bodies:
        return b"".join([head.encode(), b',"event":', event.body, b"}"])
    kind = orjson.dumps(document_of(stored).get("event_type"))
    return b'%b,"event_type":%b,"bytes":%d}' % (head.encode(), kind, len(event.body))


def summary_record(found: StoredConsultation) -> bytes:
    """Return a consultation of a list as a JSON object in one line."""
    return orjson.dumps(
        {
            "consultation_id": found.consultation,
            "events": found.events,
            "first_received": rfc3339(found.first_received_ns),
            "last_received": rfc3339(found.last_received_ns),
        }
    )


def cloudevent(stored: SequencedEvent, *, bodies: bool = True) -> bytes:
    """Return an event as a CloudEvent in the JSON format; without its data if *bodies* is False.

    One that was posted as a CloudEvent has the attributes that it was posted with. Another one gets them from its
    record; of its body only ``event_type`` and ``payload`` are shown.
    """
    event, members = stored.event, dict(slice_object(stored.event.body))
    document = document_of(stored)
    attributes = members.get("cloudevent", b"")
    if not is_cloudevent(document.get("cloudevent")):
        made = {
            "specversion": "1.0",
            "id": str(event.event_id),
            "source": f"/consultations/{event.consultation}",
            "type": document.get("event_type"),
            "subject": event.consultation,
            "time": rfc3339(event.received_ns),
        }
        attributes = orjson.dumps(made | ({"datacontenttype": JSON} if "payload" in members else {}))
    data = b"".join(
        b',"%b":%b' % (shown, members[name])
        for name, shown in (("payload", b"data"), ("data_base64", b"data_base64"))
        if bodies and name in members
    )
    return attributes.rstrip()[:-1] + data + b"}"


def rfc3339(nanoseconds: int) -> str:
    """Return a time since the Unix epoch in UTC, to the nanosecond."""
    seconds, fraction = divmod(nanoseconds, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{fraction:09d}Z"


def document_of(stored: SequencedEvent) -> dict[str, Any]:
    """Return the parsed body; ingest and persister have checked that it is an object."""
    document: dict[str, Any] = orjson.loads(stored.event.body)
    return document


def page_body(
    media_type: str, name: str, records: Sequence[bytes], links: Mapping[str, str | None], **members: str
) -> bytes:
    """Return a page of *records*.

    Args:
        media_type: JSON, NDJSON or CLOUDEVENT_BATCH.
        name: of the member that holds them, in JSON.
        records: JSON texts.
        links: URLs of other pages, or None, by the names of their members in JSON.
        members: further members, in JSON.
    """
    if media_type == NDJSON:
        return b"".join(line + b"\n" for line in records)
    if media_type == CLOUDEVENT_BATCH:
        return b"[" + b",".join(records) + b"]"
    head = b"".join(b"%b:%b," % (orjson.dumps(key), orjson.dumps(value)) for key, value in members.items())
    tail = b"".join(b",%b:%b" % (orjson.dumps(key), orjson.dumps(value)) for key, value in links.items())
    return b'{%b"%b":[%b]%b}' % (head, name.encode(), b",".join(records), tail)
