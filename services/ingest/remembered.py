"""What this process stored lately under which key, so that most retries are compared without asking anybody."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import NamedTuple

from services.contract.event import Event

#: keys that are remembered; about 300 bytes each
MOST = 32_768
_DIGEST_BYTES = 16


class Known(NamedTuple):
    """What a key stands for.

    Attributes:
        first: position of the first event under the key.
        last: position at which the log last reported it: another one once it has forgotten the first.
        digest: of the first event's body.
    """

    first: int
    last: int
    digest: bytes


class Remembered:
    """The keys used most recently, at most *most* of them. Holds digests, no events."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._known: OrderedDict[bytes, Known] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, name: bytes) -> Known | None:
        """Return what the key stands for whose :func:`name_of` is *name*, or None."""
        known = self._known.get(name)
        if known is not None:
            self._known.move_to_end(name)
        return known

    def put(self, name: bytes, known: Known) -> None:
        """Remember what a key stands for, and forget the key unused for longest if need be."""
        self._known[name] = known
        self._known.move_to_end(name)
        if len(self._known) > self._most:
            self._known.popitem(last=False)

    def forget(self, name: bytes) -> None:
        """Forget a key."""
        self._known.pop(name, None)


def digest(body: bytes) -> bytes:
    """Return what tells a body from another one."""
    return hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest()


def name_of(event: Event) -> bytes:
    """Return what stands for the key of *event*, as long for every key."""
    name = event.event_id.bytes + event.consultation.encode("ascii")
    return hashlib.blake2b(name, digest_size=_DIGEST_BYTES).digest()
