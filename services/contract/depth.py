"""How deep a JSON text is nested: deeper than a limit or not, without building anything of it."""

from __future__ import annotations

import re

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
#: everything but brackets
_REST = bytes(set(range(256)) - set(b"[]{}"))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def deeper_than(raw: bytes, limit: int) -> bool:
    """Say whether objects and arrays of *raw*, a valid JSON text, are nested more than *limit* deep.

    Most events have fewer brackets in all than the limit, and cost two counts. Others are stripped of their strings,
    in which a bracket means nothing, and counted through.
    """
    if raw.count(b"{") + raw.count(b"[") <= limit:
        return False
    depth = 0
    for bracket in _STRING.sub(b"", raw).translate(None, _REST):
        depth += _STEP[bracket]
        if depth > limit:
            return True
    return False
