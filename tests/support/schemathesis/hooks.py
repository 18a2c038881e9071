"""What schemathesis cannot know by itself: how NDJSON is written."""

from __future__ import annotations

import json
from typing import Any

import schemathesis
from schemathesis.transport import SerializationContext


@schemathesis.serializer("application/x-ndjson", "application/octet-stream")
def serialize(context: SerializationContext, value: Any) -> Any:
    """Return *value* as it stands: the schema is a text; what is none is drawn to be refused."""
    return value if isinstance(value, bytes) else (value if isinstance(value, str) else json.dumps(value)).encode()
