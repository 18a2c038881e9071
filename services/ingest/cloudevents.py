"""CloudEvents 1.0 over HTTP: what of them is stored, and under which id (docs/http.md).

An event's type becomes ``event_type``, its data ``payload``, byte for byte; its attributes are kept beside them in
``cloudevent``. The specification makes ``source`` and ``id`` together unique, so both make the event id.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

import orjson
from multidict import CIMultiDictProxy

from services.contract.errors import InvalidIdError
from services.contract.event import InvalidBodyError, NotJsonError, without_line_breaks
from services.contract.ids import check_consultation_id, event_id_of_cloudevent
from services.ingest.batch import Draft, members

#: the header of the binary mode that no event lacks
VERSION_HEADER = "ce-specversion"
_PREFIX = "ce-"
_VERSION = "1.0"
#: attributes that every event has
_REQUIRED = ("id", "source", "specversion", "type")
#: members of the JSON format that are no attributes
_DATA, _DATA_BASE64 = "data", "data_base64"
_ATTRIBUTE = re.compile(r"[a-z0-9]{1,64}", re.ASCII)
_JSON_TYPE = re.compile(r"[^/]+/(?:[^+]+\+)?json", re.IGNORECASE)
_DEFAULT_TYPE = "application/json"


def read_structured(raw: bytes) -> Draft:
    """Read an event in the JSON format, with its data in it.

    Raises:
        PoisonError: it is no CloudEvent. The message quotes nothing of it.
    """
    try:
        document = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise NotJsonError("a CloudEvent is a JSON object in UTF-8") from None
    if not isinstance(document, dict):
        raise InvalidBodyError("a CloudEvent is a JSON object")
    attributes = {name: value for name, value in document.items() if name not in (_DATA, _DATA_BASE64)}
    if _DATA in document and document.get(_DATA_BASE64) is not None:
        raise InvalidBodyError("a CloudEvent has data or data_base64, not both")
    if document.get(_DATA_BASE64) is not None:
        return _draft(attributes, _of_base64(document[_DATA_BASE64], attributes))
    return _draft(attributes, {"payload": members(raw)[_DATA]} if _DATA in document else {})


def read_binary(headers: CIMultiDictProxy[str], body: bytes) -> Draft:
    """Read an event whose attributes are in *headers*, and whose data is *body*.

    Raises:
        PoisonError: it is no CloudEvent. The message quotes nothing of it.
    """
    attributes: dict[str, Any] = {}
    for header, value in headers.items():
        name = header.lower()
        if name.startswith(_PREFIX):
            if name[len(_PREFIX) :] in attributes:
                raise InvalidBodyError("a CloudEvents attribute is there twice")
            attributes[name[len(_PREFIX) :]] = _decoded(value)
    if "datacontenttype" in attributes:
        raise InvalidBodyError("datacontenttype is the Content-Type header")
    if kind := headers.get("Content-Type", "").strip():
        attributes["datacontenttype"] = _decoded(kind)
    return _draft(attributes, _of_bytes(body, attributes) if body else {})


def _draft(attributes: dict[str, Any], data: Mapping[str, bytes]) -> Draft:
    """Put the event together as it is stored; the order does not depend on that in which it came."""
    attributes = {name: value for name, value in attributes.items() if value is not None}
    _check(attributes)
    subject = attributes.get("subject")
    if data:
        attributes.setdefault("datacontenttype", _DEFAULT_TYPE)
    parts = {
        "event_type": orjson.dumps(attributes["type"]),
        **data,
        "cloudevent": orjson.dumps(attributes, option=orjson.OPT_SORT_KEYS),
    }
    body = b"{" + b",".join(b'"%b":%b' % (name.encode(), value) for name, value in parts.items()) + b"}"
    event_id = event_id_of_cloudevent(attributes["source"], attributes["id"])
    return Draft(without_line_breaks(body), subject, event_id)


def _check(attributes: Mapping[str, Any]) -> None:
    for name in _REQUIRED:
        if not isinstance(attributes.get(name), str) or not attributes[name]:
            raise InvalidBodyError(f"a CloudEvent has the attribute {name}, a string that is not empty")
    if attributes["specversion"] != _VERSION:
        raise InvalidBodyError("specversion must be 1.0")
    for name, value in attributes.items():
        if _ATTRIBUTE.fullmatch(name) is None:
            raise InvalidBodyError("names of CloudEvents attributes are lower-case letters and digits")
        if not isinstance(value, str | int):  # a bool is an int
            raise InvalidBodyError("a CloudEvents attribute is a string, a number or a boolean")
    if not isinstance(attributes.get("datacontenttype", ""), str):
        raise InvalidBodyError("datacontenttype is a string")
    subject = attributes.get("subject")
    if subject is not None:
        if not isinstance(subject, str):
            raise InvalidBodyError("subject is a string")
        try:
            check_consultation_id(subject)
        except InvalidIdError:
            raise InvalidBodyError("subject names the consultation: 1 to 128 of A-Z a-z 0-9 _ -") from None


def _of_base64(value: Any, attributes: Mapping[str, Any]) -> dict[str, bytes]:
    try:
        data = base64.b64decode(value, validate=True) if isinstance(value, str) else None
    except ValueError:
        data = None
    if data is None:
        raise InvalidBodyError("data_base64 is a string in Base64")
    return _of_bytes(data, attributes)


def _of_bytes(data: bytes, attributes: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the member that keeps *data*: JSON as it is, text as a string, anything else in Base64."""
    kind = str(attributes.get("datacontenttype", _DEFAULT_TYPE)).partition(";")[0].strip().lower()
    if _JSON_TYPE.fullmatch(kind):
        try:
            orjson.loads(data)
        except orjson.JSONDecodeError:
            raise NotJsonError("the data is not the JSON that its content type says it is") from None
        return {"payload": data}
    if kind.startswith("text/"):
        try:
            return {"payload": orjson.dumps(data.decode("utf-8"))}
        except UnicodeDecodeError:
            raise InvalidBodyError("text must be in UTF-8") from None
    return {_DATA_BASE64: orjson.dumps(base64.b64encode(data).decode("ascii"))}


def _decoded(value: str) -> str:
    """Return the attribute that a header's *value* stands for: quoted or not, with percent-encoded UTF-8."""
    if len(value) >= 2 and value[0] == value[-1] == '"':
        value = re.sub(r"\\(.)", r"\1", value[1:-1])
    try:
        value = unquote(value, errors="strict")
        value.encode("utf-8")
    except UnicodeError:
        raise InvalidBodyError("an attribute's header is not percent-encoded UTF-8") from None
    return value
