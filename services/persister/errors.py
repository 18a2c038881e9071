"""Errors that stop a persister, one of its partitions, or an answer.

::

    TransientError
        VolumeBusyError     another process of the volume keeps the claim lock
        NotNowError         a partition's file cannot be read right now
    PermanentError
        VolumeError         the data directory is not a volume of this store
        PoisonFloodError    too many poison messages: a bad release rather than bad messages
"""

from __future__ import annotations

import traceback
from pathlib import Path

from fiq.corpus import CorpusError
from fiq.errors import FiqError, PermanentError, TransientError


class VolumeBusyError(TransientError):
    """Raised when another process of the volume has held the claim lock for longer than a claim can take."""


class NotNowError(TransientError):
    """Raised when a question cannot be answered right now: the file was released, or a batch is half written."""


class VolumeError(PermanentError):
    """Raised when a data directory cannot serve as a volume: foreign, incomplete or unreadable."""


class PoisonFloodError(PermanentError):
    """Raised when too many messages are poison: the partition stops instead of moving all of them to `fi-dead`."""


def reason_of(error: BaseException) -> str:
    """Return the message of an error of ours; of others only the type, since their text may quote data."""
    return str(error) if isinstance(error, FiqError | CorpusError) else f"unexpected {type(error).__name__}"


def described(error: BaseException) -> dict[str, str]:
    """Return the fields of a log line about *error*; for errors that are not ours with the place in the code."""
    values = {"error": type(error).__name__, "reason": reason_of(error)}
    if not isinstance(error, FiqError | CorpusError) and error.__traceback__ is not None:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        values["where"] = f"{Path(frame.filename).name}:{frame.lineno}"
    return values
