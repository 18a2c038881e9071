"""Hold the signals that ask a process to stop until somebody listens for them.

The imports of a service take most of a second. A stop in that time would end it with 143, which looks like a failure,
or, in a container where it is the first process, would be lost: the kernel drops a signal without a handler there, and
the container would be killed at the end of its grace period.
"""

from __future__ import annotations

import signal

#: what asks a service to stop
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def hold() -> None:
    """Let stop signals wait; the first thing that a process does, before its imports."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def release() -> None:
    """Take the ones that waited, and those that come: the handlers are there."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
