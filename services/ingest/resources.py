"""What may be posted where: each resource's path, and the forms in which it takes events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from aiohttp import web

from services.ingest import problems
from services.ingest.body import media_type
from services.ingest.cloudevents import VERSION_HEADER
from services.ingest.problems import RequestRefusedError

_JSON = "application/json"


class Form(Enum):
    """How a body holds events."""

    EVENT = "event"
    LINES = "lines"
    ARRAY = "array"
    CLOUDEVENT = "cloudevent"
    CLOUDEVENT_BINARY = "cloudevent-binary"
    CLOUDEVENT_BATCH = "cloudevent-batch"

    @property
    def is_batch(self) -> bool:
        """Whether it may hold several."""
        return self in (Form.LINES, Form.ARRAY, Form.CLOUDEVENT_BATCH)


@dataclass(frozen=True, slots=True)
class Resource:
    """A path to which events are posted.

    Attributes:
        path: as the router knows it.
        forms: what it takes, by media type.
        binary: whether it also takes CloudEvents whose attributes are headers, whatever the media type.
    """

    path: str
    forms: Mapping[str, Form]
    binary: bool = False

    def form(self, request: web.Request) -> Form:
        """Return the form of *request*'s body.

        Raises:
            RequestRefusedError: the resource does not take it.
        """
        kind = media_type(request.headers)
        form = self.forms.get(kind)
        if self.binary and VERSION_HEADER in request.headers and form in (None, Form.EVENT):
            return Form.CLOUDEVENT_BINARY
        if form is None:
            raise RequestRefusedError(problems.UNSUPPORTED_MEDIA_TYPE)
        return form


_CLOUDEVENTS = {
    "application/cloudevents+json": Form.CLOUDEVENT,
    "application/cloudevents-batch+json": Form.CLOUDEVENT_BATCH,
}
_BATCHES = {
    "application/x-ndjson": Form.LINES,
    _JSON: Form.ARRAY,
    "application/cloudevents-batch+json": Form.CLOUDEVENT_BATCH,
}

#: the events of one consultation
EVENTS = Resource("/consultations/{consultation}/events", {_JSON: Form.EVENT, **_CLOUDEVENTS}, binary=True)
#: many events of one consultation
BATCH = Resource("/consultations/{consultation}/events/batch", _BATCHES)
#: many events, each of which names its consultation
ANY_BATCH = Resource("/events/batch", _BATCHES)
#: CloudEvents whose subjects name their consultations
ANY_CLOUDEVENTS = Resource("/events", _CLOUDEVENTS, binary=True)

RESOURCES = (EVENTS, BATCH, ANY_BATCH, ANY_CLOUDEVENTS)
