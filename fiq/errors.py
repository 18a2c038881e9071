"""The root errors of the project.

::

    FiqError
        TransientError          wait and retry: the same call may succeed later
        PermanentError          stop: an operator must act, the message says how
            ConfigurationError  a setting is missing, malformed or contradicts another
            BindError           a service cannot listen on its address
        PoisonError             set this one message aside; the others are not affected
            InvalidIdError      a consultation id, an idempotency key or an event id is malformed

Each package derives its errors from one of the three roots in its own ``errors.py``. The root alone decides what
happens next. No message may hold a payload: payloads are medical data.
"""

from __future__ import annotations

from collections.abc import Sequence


class FiqError(Exception):
    """Root of all errors that the project raises."""

    def __init__(self, message: str) -> None:
        super().__init__(message)


class TransientError(FiqError):
    """Raised when a retry may help."""


class PermanentError(FiqError):
    """Raised when only an operator can help; the message says what to do."""


class PoisonError(FiqError):
    """Raised when one message can never be processed."""


class ConfigurationError(PermanentError):
    """Raised at start when settings are wrong; names every problem at once."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("configuration: " + "; ".join(problems))
        self.problems = tuple(problems)


class BindError(PermanentError):
    """Raised at start when a service cannot listen on its address: in use, or not an address of this host."""


class InvalidIdError(PoisonError):
    """Raised when an id does not have the form that NATS subjects and HDF5 links need."""
