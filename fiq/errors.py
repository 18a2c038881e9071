"""The root errors of the project.

::

    FiqError
        TransientError          wait and retry: the same call may succeed later
        PermanentError          stop: an operator must act, the message says how
            ConfigurationError  a setting is missing, malformed or contradicts another
            BindError           the address of a service cannot be listened on
        PoisonError             set this one message aside; its neighbours are fine
            InvalidIdError      a consultation id, an idempotency key or an event id is malformed

Each package derives its own errors from one of the three roots in its own ``errors.py``; the root alone decides what
happens next. No message of any of them may hold a payload: payloads are medical data.
"""

from __future__ import annotations

from collections.abc import Sequence


class FiqError(Exception):
    """Anything that the project raises on purpose."""

    def __init__(self, message: str) -> None:
        super().__init__(message)


class TransientError(FiqError):
    """Raised when waiting and trying again may help."""


class PermanentError(FiqError):
    """Raised when only an operator can help; the message says what to do."""


class PoisonError(FiqError):
    """Raised when one message can never be processed, whatever is done about the rest."""


class ConfigurationError(PermanentError):
    """Raised at start when settings are wrong; names every problem at once."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("configuration: " + "; ".join(problems))
        self.problems = tuple(problems)


class BindError(PermanentError):
    """Raised at start when an address cannot be listened on: it is taken, or none of this host."""


class InvalidIdError(PoisonError):
    """Raised when an id does not have the form that NATS subjects and HDF5 links need."""
