"""The chain of a consultation: each row carries a hash of its event and of the row before it.

An event that is changed, removed or moved no longer fits the row behind it. Whoever rewrites all later rows too goes
unnoticed: the chain finds damage and honest mistakes, it is no signature. Events cut off at the end break no chain;
they are missed by the partition's ``committed_events``.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256

from services.corpus.format import CONSULTATIONS
from services.corpus.records import Identity

#: bytes of a chain value
CHAIN_BYTES = 32

_PREFIX = "fiq-chain-1"


def chain_start(identity: Identity, consultation: str, *, of: str = CONSULTATIONS) -> bytes:
    """Return what the first row of a consultation is chained to, or with *of* that of its conflicts.

    It names what never changes in a consultation's life; volume and epoch do when a partition moves, and the copies of
    two stores are to have equal chains.
    """
    # a consultation's id has no slash: the names of the two groups never meet
    name = consultation if of == CONSULTATIONS else f"{of}/{consultation}"
    return sha256(_partition_name(identity) + name.encode()).digest()


def chain_next(before: bytes, row: bytes, body: bytes) -> bytes:
    """Return the chain value of an event.

    Args:
        before: that of the row before it, or :func:`chain_start`.
        row: the row's first 48 bytes, all but the chain value itself.
        body: the body without its line feed.
    """
    return sha256(b"".join((before, row, body))).digest()


@lru_cache(64)
def _partition_name(identity: Identity) -> bytes:
    numbers = (str(identity.partition), str(identity.partitions))
    return "\0".join([_PREFIX, identity.stream, identity.stream_created, *numbers, ""]).encode()
