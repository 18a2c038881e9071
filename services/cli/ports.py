"""Free TCP ports on loopback."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

from services.cli.errors import CommandError

LOOPBACK = "127.0.0.1"
#: lowest port that is chosen
_LOWEST = 10240
_EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
#: the start of Linux's default range, and of nothing else's
_DEFAULT_EPHEMERAL = 32768


def is_free(port: int, host: str = LOOPBACK) -> bool:
    """Say whether a server could listen on *port* now."""
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        # as servers do: a connection of an earlier run in TIME_WAIT does not count
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def free_ports(count: int) -> list[int]:
    """Choose *count* different free ports below the range from which the kernel takes ports for outgoing connections.

    A port of that range could be taken by any client while a node is down; and a client that tries to reconnect to
    such a port may even be connected to itself (TCP's simultaneous open), and so keep the node from coming back.

    Raises:
        CommandError: there are not enough.
    """
    top = _first_ephemeral()
    low = _LOWEST if top - _LOWEST >= 1000 else 1024
    candidates = list(range(low, top))
    random.shuffle(candidates)
    chosen: list[int] = []
    for port in candidates:
        if len(chosen) == count:
            break
        if is_free(port):
            chosen.append(port)
    if len(chosen) < count:
        raise CommandError(f"no {count} free TCP ports between {low} and {top} on {LOOPBACK}; stop something first")
    return chosen


def _first_ephemeral() -> int:
    try:
        first = int(_EPHEMERAL_RANGE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return _DEFAULT_EPHEMERAL
    # a machine that gives nearly everything away: then there is nothing to keep clear of
    return first if first >= 4096 else _DEFAULT_EPHEMERAL
