"""What can go wrong in a command; each message says what to do.

::

    PermanentError
        CommandError                the command cannot do what was asked
            MissingServerError      no nats-server and no nats.conf to run it with
            ChildFailedError        a process that was started ended, or was not ready in time
            PortTakenError          a port was taken by somebody else between the choice and the start
            AlreadyRunningError     another fiq holds the folder
            NotRunningError         nothing runs where the command looked
            BackupError             a backup cannot be made, or is not what its manifest says
            RestoreRefusedError     a backup does not fit what runs now, or where it would go
            NotWholeError           the cluster did not get whole in time
"""

from __future__ import annotations

from fiq.errors import PermanentError


class CommandError(PermanentError):
    """Raised when a command cannot do what was asked."""


class MissingServerError(CommandError):
    """Raised when there is no nats-server binary, or no configuration for it."""


class ChildFailedError(CommandError):
    """Raised when a process that was started ended by itself, or was not ready in time."""


class PortTakenError(ChildFailedError):
    """Raised when a process could not listen because its port was taken in the meantime."""


class AlreadyRunningError(CommandError):
    """Raised when another fiq holds the folder."""


class NotRunningError(CommandError):
    """Raised when nothing runs where the command looked."""


class BackupError(CommandError):
    """Raised when a backup cannot be made, or is not what its manifest says."""


class RestoreRefusedError(CommandError):
    """Raised when a volume cannot be put back or given up as things are, or nobody said yes; nothing was put there."""


class NotWholeError(CommandError):
    """Raised when the cluster did not get whole again in time: whatever was to come next was not begun."""
