"""What stops a persister, or one of its partitions.

::

    TransientError
        VolumeBusyError     another process of the volume keeps the claim lock
    PermanentError
        VolumeError         the data directory is not what this store's volume must be
        PoisonFloodError    too many bad messages: a bad release rather than bad messages
"""

from __future__ import annotations

from services.contract.errors import PermanentError, TransientError


class VolumeBusyError(TransientError):
    """Raised when another process of the volume has held the claim lock for longer than a claim takes."""


class VolumeError(PermanentError):
    """Raised when a data directory cannot serve as a volume: foreign, incomplete or unreadable."""


class PoisonFloodError(PermanentError):
    """Raised when bad messages come in a flood: the partition stops instead of emptying itself into `fi-dead`."""
