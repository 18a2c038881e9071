"""Seeds of the users' nkeys."""

from __future__ import annotations

import os

import nkeys


def new_seed() -> bytes:
    """Make the seed of a user: 58 characters, with a line's end."""
    return bytes(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)) + b"\n"
