"""How much memory the kernel lets this process have, so that bounds can follow it instead of being killed for it."""

from __future__ import annotations

from pathlib import Path

#: where the kernel shows a container its own limit: cgroup v2, then v1
_FILES = ("memory.max", "memory/memory.limit_in_bytes")
#: v1 writes a number of this order where there is no limit, bytes
_UNLIMITED = 2**60


def memory_limit(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the limit of the container, in bytes; None outside of one, or when it has none.

    Args:
        root: where control groups are mounted; within a container its own group is the root.
    """
    for name in _FILES:
        try:
            text = (root / name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        return int(text) if text.isdigit() and int(text) < _UNLIMITED else None
    return None
