"""Where the parts of a JSON array or object begin and end, so that they can be kept byte for byte.

The text must have been parsed before: only then does looking for brackets, commas and strings suffice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import orjson

_STRING = rb'"(?:[^"\\]++|\\.)*+"'
#: what comes next outside strings: at the top a comma counts, inside only brackets do
_AT_TOP = re.compile(rb'[^"\[\]{},]*+(?:' + _STRING + rb'[^"\[\]{},]*+)*+([\[\]{},])', re.DOTALL)
_INSIDE = re.compile(rb'[^"\[\]{}]*+(?:' + _STRING + rb'[^"\[\]{}]*+)*+([\[\]{}])', re.DOTALL)
_NAME = re.compile(rb"[ \t\r\n]*+(" + _STRING + rb")[ \t\r\n]*+:", re.DOTALL)
_SPACE = b" \t\r\n"


def elements(raw: bytes) -> Iterator[bytes]:
    """Yield the elements of the JSON array *raw*, each as it stands there, without the white space around it."""
    return _parts(raw)


def members(raw: bytes) -> dict[str, bytes]:
    """Return the members of the JSON object *raw*, each value as it stands there; of members of one name the last."""
    found: dict[str, bytes] = {}
    for part in _parts(raw):
        name = _NAME.match(part)
        assert name is not None
        found[orjson.loads(name[1])] = part[name.end() :].strip(_SPACE)
    return found


def _parts(raw: bytes) -> Iterator[bytes]:
    """Yield what stands between the commas of the outermost array or object."""
    begin = position = raw.index(raw.strip(_SPACE)[:1]) + 1
    depth = 1
    while depth:
        found = (_AT_TOP if depth == 1 else _INSIDE).match(raw, position)
        assert found is not None
        position = found.end()
        if found[1] in b"[{":
            depth += 1
        elif found[1] == b",":
            yield raw[begin : position - 1].strip(_SPACE)
            begin = position
        else:
            depth -= 1
    if last := raw[begin : position - 1].strip(_SPACE):
        yield last
