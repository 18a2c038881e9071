"""W3C Trace Context, level 1: the trace of a request, which the message of its event carries on.

Headers of requests are checked, because they go into messages and logs. Invalid values are ignored, as the
specification requires: https://www.w3.org/TR/trace-context-1/
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: headers of requests and of messages
PARENT_HEADER = "traceparent"
STATE_HEADER = "tracestate"
#: a longer tracestate is ignored, characters
MAX_STATE = 512
#: a tracestate with more members is ignored
MAX_MEMBERS = 32

_PARENT = re.compile(
    r"(?P<version>(?!ff)[0-9a-f]{2})-(?P<ids>(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16})-[0-9a-f](?P<flags>[0-9a-f])"
    r"(?P<rest>-\S*)?"
)
_MEMBER = re.compile(
    r"(?P<key>[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"
    r"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)
#: last digits of flags with the lowest bit, ``sampled``
_SAMPLED = frozenset("13579bdf")


@dataclass(frozen=True, slots=True)
class Trace:
    """The position of a request in a trace.

    Attributes:
        parent: a valid ``traceparent`` of version 00.
        state: a valid ``tracestate``, or an empty string.
    """

    parent: str
    state: str = ""

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""
        return self.parent[3:35]

    @property
    def sampled(self) -> bool:
        """Whether the caller may have recorded the request."""
        return self.parent[-1] in _SAMPLED

    def headers(self) -> dict[str, str]:
        """Return the headers that carry it on."""
        return {PARENT_HEADER: self.parent, STATE_HEADER: self.state} if self.state else {PARENT_HEADER: self.parent}


def read_trace(parents: Sequence[str], states: Sequence[str]) -> Trace | None:
    """Return the trace of a request; None if it has no valid one.

    Args:
        parents: values of its ``traceparent`` headers; only a single one is valid.
        states: values of its ``tracestate`` headers, in their order.
    """
    if len(parents) != 1:
        return None
    parent = _read_parent(parents[0])
    return None if parent is None else Trace(parent, _read_state(states) if states else "")


def trace_of_message(headers: Mapping[str, str]) -> Trace | None:
    """Return the trace in a message's *headers*; None if they have no valid one."""
    parent = headers.get(PARENT_HEADER)
    if parent is None:
        return None
    state = headers.get(STATE_HEADER)
    return read_trace((parent,), () if state is None else (state,))


def _read_parent(value: str) -> str | None:
    match = _PARENT.fullmatch(value)
    if match is None:
        return None
    version, ids, flags, rest = match.groups()
    if version == "00":
        return value if rest is None else None
    # of a later version only the fields of version 00 are used, and sent on as version 00
    return f"00-{ids}-{'01' if flags in _SAMPLED else '00'}"


def _read_state(values: Sequence[str]) -> str:
    members = [stripped for value in values for member in value.split(",") if (stripped := member.strip(" \t"))]
    state = ",".join(members)
    if len(state) > MAX_STATE or len(members) > MAX_MEMBERS:
        return ""
    matches = [_MEMBER.fullmatch(member) for member in members]
    keys = {match["key"] for match in matches if match is not None}
    return state if len(keys) == len(members) else ""  # each member is valid, and no key occurs twice
