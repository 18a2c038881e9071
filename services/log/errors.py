"""What can go wrong with the log.

::

    TransientError
        LogUnavailableError         no answer in time, no leader, no connection: may or may not be stored
        LogFullError                the stream is at its limit and takes no more
        DuplicateInFlightError      the same message id is being stored just now
        TooManyInFlightError        this process is at its own limit
        CorpusAwayError             no persister answers for the partition
    PermanentError
        LogRefusedError             the broker refuses for good: configuration, permission, size
            ProvisionError          the stream cannot be what the settings ask for
            LogForbiddenError       the NATS user of this process may not do that
        LogAccessError              the nodes refuse this process: certificates, TLS, user
        StartupError                the cluster was out of reach for too long at start
        LogMismatchError            the log is not the one that the sink's position belongs to
        PositionGoneError           the log does not hold what comes after a position of the feed
        PlacementError              record, file and volume disagree about where a partition is
"""

from __future__ import annotations

from fiq.errors import PermanentError, TransientError


class LogUnavailableError(TransientError):
    """Raised when the log did not answer in time; the operation may or may not have happened."""


class LogFullError(TransientError):
    """Raised when the stream is at its limit: nothing was stored."""


class DuplicateInFlightError(TransientError):
    """Raised when another append of the same message id has not been decided within the deadline."""


class TooManyInFlightError(TransientError):
    """Raised when this process has its limit of appends in flight: nothing was sent."""


class CorpusAwayError(TransientError):
    """Raised when no persister answers for the partition of a consultation: its part of the corpus cannot be read."""


class LogRefusedError(PermanentError):
    """Raised when the broker refuses and would refuse again: configuration, permission or size."""


class ProvisionError(LogRefusedError):
    """Raised when the stream or a consumer cannot be made what the settings ask for."""


class LogForbiddenError(LogRefusedError):
    """Raised when the NATS user of this process has no permission for a subject; nothing was sent or received."""


class LogAccessError(PermanentError):
    """Raised when the nodes refuse this process, or it refuses them: certificates, TLS, or its user."""


class StartupError(PermanentError):
    """Raised when the cluster was out of reach for all of FI_STARTUP_TIMEOUT."""


class LogMismatchError(PermanentError):
    """Raised when the log is not the one that the sink's position belongs to (re-created, restored, trimmed)."""


class PositionGoneError(PermanentError):
    """Raised when the log does not hold all events after a position of the feed: some were trimmed, or it is another.

    Its message says what the client should do.
    """


class PlacementError(PermanentError):
    """Raised when record, partition file and volume disagree about where a partition is."""
