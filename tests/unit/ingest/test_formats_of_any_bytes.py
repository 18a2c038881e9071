"""Whatever a body holds, it is an event or it is refused: nothing else comes out of reading it."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from fiq.errors import PoisonError
from fiq.event import check_body
from services.ingest.formats import (
    BatchContext,
    BatchEvent,
    BodyFormat,
    ParsedEvent,
    parse_binary_cloudevent,
    parse_cloudevent,
    read_batch,
)
from services.ingest.problems import RequestRefusedError

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
_KNOWN = (
    "event_type event_id consultation_id payload specversion id source type subject "
    "time datacontenttype data data_base64 ext Ext"
)
NAMES = st.sampled_from(_KNOWN.split())
TEXTS = ["A", "c-1", "1.0", "application/json", "text/plain", "x/y", "AA==", "eyJhIjoxfQ==", ""]
VALUES = st.sampled_from(TEXTS) | JSON
OBJECTS = st.dictionaries(NAMES, VALUES, max_size=15)
RAW = st.binary(max_size=60) | (OBJECTS | JSON).map(lambda value: json.dumps(value).encode())
CONTEXTS = st.sampled_from([BatchContext("c-1", "k", 1, 200, 5), BatchContext(None, None, 1, 200, 5)])


def _stored(parsed: ParsedEvent) -> bool:
    return check_body(parsed.body) is parsed.body


@given(st.lists(RAW, max_size=5), CONTEXTS, st.booleans())
async def test_a_batch_is_lines_or_a_refusal(parts: list[bytes], context: BatchContext, is_array: bool) -> None:
    """And each line is what the persister takes."""
    raw = b"[" + b",".join(parts) + b"]" if is_array else b"\n".join(parts)
    lines: list[BatchEvent] = []
    with contextlib.suppress(RequestRefusedError):
        lines = await read_batch(raw, BodyFormat.ARRAY if is_array else BodyFormat.LINES, context)
    assert all(check_body(line.event.body) is line.event.body for line in lines)


@given(RAW)
def test_a_structured_cloudevent_is_an_event_or_poison(raw: bytes) -> None:
    """With values of every kind in every place."""
    with contextlib.suppress(PoisonError):
        assert _stored(parse_cloudevent(raw))


@given(OBJECTS, st.sampled_from(["A", "1", "%", "%ff", '"', "ä"]))
def test_a_complete_structured_cloudevent_is_an_event_or_poison(members: dict[str, Any], identifier: str) -> None:
    """The same, when what is required is there."""
    required = {"specversion": "1.0", "id": identifier, "source": "/s", "type": "T"}
    with contextlib.suppress(PoisonError):
        assert _stored(parse_cloudevent(orjson.dumps(_without_what_json_cannot_say(members) | required)))


@given(st.dictionaries(NAMES, st.text(), max_size=6), st.binary(max_size=40), st.text(max_size=20))
def test_a_binary_cloudevent_is_an_event_or_poison(attributes: dict[str, str], body: bytes, kind: str) -> None:
    """Headers as aiohttp gives them, also such as no client should send."""
    headers = {"ce-specversion": "1.0", "ce-id": "1", "ce-source": "/s", "ce-type": "T", "Content-Type": kind}
    headers |= {
        f"ce-{name}": value.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
        for name, value in attributes.items()
    }
    with contextlib.suppress(PoisonError):
        assert _stored(parse_binary_cloudevent(CIMultiDictProxy(CIMultiDict(headers)), body))


def _without_what_json_cannot_say(members: dict[str, Any]) -> dict[str, Any]:
    possible = {}
    for name, value in members.items():
        with contextlib.suppress(TypeError):
            orjson.dumps(value)
            possible[name] = value
    return possible
