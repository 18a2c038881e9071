"""What can go wrong in a command; each message says what to do.

::

    PermanentError
        CommandError                the command cannot do what was asked
            UsageError              its arguments do not fit: exit code 2
            MissingServerError      no nats-server, or no nats.conf for it
            ChildFailedError        a process that was started ended, or was not ready in time
            PortTakenError          another process took the port before it could be used
            AlreadyRunningError     another fiq has locked the folder
            NotRunningError         no stack runs where the command looked
            BackupError             a backup cannot be made, or does not match its manifest
            RestoreRefusedError     a backup does not fit the cluster, or the directory that it would go to
            NotReadyError           the cluster was not ready in time
"""

from __future__ import annotations

from fiq.errors import PermanentError


class CommandError(PermanentError):
    """Raised when a command cannot do what was asked."""


class UsageError(CommandError):
    """Raised when the arguments of a command do not fit together, or one of them is malformed."""


class MissingServerError(CommandError):
    """Raised when there is no nats-server binary, or no configuration for it."""


class ChildFailedError(CommandError):
    """Raised when a process that was started ended by itself, or was not ready in time."""


class PortTakenError(ChildFailedError):
    """Raised when a process could not listen because another one took its port."""


class AlreadyRunningError(CommandError):
    """Raised when another fiq has locked the folder."""


class NotRunningError(CommandError):
    """Raised when no stack runs where the command looked."""


class BackupError(CommandError):
    """Raised when a backup cannot be made, or does not match its manifest."""


class RestoreRefusedError(CommandError):
    """Raised when a volume cannot be restored or given up as things are, or --yes is missing; nothing was changed."""


class NotReadyError(CommandError):
    """Raised when the cluster was not ready in time; the next step was not begun."""
