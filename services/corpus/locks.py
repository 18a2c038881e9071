"""Advisory locks (``flock``) on the files of a partition.

``<pp>.h5.wal``  exclusive, held by the writer for life: there is one writer.
``<pp>.h5``      shared, held by the writer and by every reader: HDF5 itself takes it, so stock readers open the file
                 while the writer lives and a stock ``r+`` is refused. A checkpoint holds it exclusively while it
                 copies, some 0.05-0.2 s.
directory        exclusive, held while files are created.

Whoever waits for a lock waits for a bounded time.
"""

from __future__ import annotations

import fcntl
import time

from services.corpus.errors import CorpusLockedError

#: how long an open waits for a lock that is held only for moments, seconds
LOCK_WAIT = 5.0

_POLL_SECONDS = 0.02


def try_lock(fd: int, *, exclusive: bool) -> bool:
    """Take or convert the lock at once; return whether it was got.

    A conversion that fails loses the lock held before (flock(2)): the caller must take it again.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock(fd: int, *, exclusive: bool, timeout: float, refusal: str) -> None:
    """Take the lock, waiting for at most *timeout* seconds.

    Raises:
        CorpusLockedError: another process held it all the time; the message is *refusal*.
    """
    deadline = time.monotonic() + timeout
    while not try_lock(fd, exclusive=exclusive):
        if time.monotonic() >= deadline:
            raise CorpusLockedError(refusal)
        time.sleep(_POLL_SECONDS)


def unlock(fd: int) -> None:
    """Release the lock, even where a duplicate of the descriptor lives on in a forked child."""
    fcntl.flock(fd, fcntl.LOCK_UN)
