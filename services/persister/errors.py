"""What stops a persister, or one of its partitions.

::

    TransientError
        VolumeBusyError     another process of the volume keeps the claim lock
    PermanentError
        VolumeError         the data directory is not what this store's volume must be
        PoisonFloodError    too many bad messages: a bad release rather than bad messages
"""

from __future__ import annotations

import traceback
from pathlib import Path

from fiq.corpus import CorpusError
from fiq.errors import FiqError, PermanentError, TransientError


class VolumeBusyError(TransientError):
    """Raised when another process of the volume has held the claim lock for longer than a claim takes."""


class VolumeError(PermanentError):
    """Raised when a data directory cannot serve as a volume: foreign, incomplete or unreadable."""


class PoisonFloodError(PermanentError):
    """Raised when bad messages come in a flood: the partition stops instead of emptying itself into `fi-dead`."""


def reason_of(error: BaseException) -> str:
    """Return the text of our own errors, the type of others."""
    return str(error) if isinstance(error, FiqError | CorpusError) else f"unexpected {type(error).__name__}"


def described(error: BaseException) -> dict[str, str]:
    """Return the keys and values of a log line about *error*; of others' errors, with the place in the code."""
    values = {"error": type(error).__name__, "reason": reason_of(error)}
    if not isinstance(error, FiqError | CorpusError) and error.__traceback__ is not None:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        values["where"] = f"{Path(frame.filename).name}:{frame.lineno}"
    return values
