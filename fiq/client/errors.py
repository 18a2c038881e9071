"""The errors of a client's calls.

::

    FiqError
        ClientError                      the last problem, and whether the event may be stored
            InvalidArgumentError         (permanent, a ValueError) a URL, token, id, key or event is malformed
            RefusedError                 (permanent) the service refuses the request, and would again
            UnexpectedAnswerError        (permanent) the answer is not from fiq, or from another version of it
            ClosedError                  (permanent) the client was closed
            GaveUpError                  (transient) the deadline passed: the same call again is safe

No message of any of them holds an event: the only thing that they quote of an answer is a problem document, and that
quotes no request.
"""

from __future__ import annotations

from fiq.client.records import Problem
from fiq.errors import FiqError, PermanentError, TransientError

#: refused events of a batch that a message names
_SHOWN_LINES = 3


class ClientError(FiqError):
    """Every error of a client; never raised itself.

    Attributes:
        problem: of the last answer; None if there was none.
        may_be_stored: whether the event, or some of the batch, may be stored nevertheless. The same call with the same
            key finds out, and never stores it twice.
    """

    def __init__(self, message: str, *, problem: Problem | None = None, may_be_stored: bool = False) -> None:
        super().__init__(message)
        self.problem = problem
        self.may_be_stored = may_be_stored

    def __str__(self) -> str:
        """Return the message, with the first of a batch's refused events."""
        lines = self.problem.lines if self.problem else ()
        shown = [f"event {line.number}: {line.reason}" for line in lines[:_SHOWN_LINES]]
        if len(lines) > _SHOWN_LINES:
            shown.append(f"and {len(lines) - _SHOWN_LINES} more")
        return " ".join([super().__str__(), *(["(" + "; ".join(shown) + ")"] if shown else [])])

    @property
    def type(self) -> str | None:
        """The problem's type, ``/problems/…``; ``about:blank`` if the answer was not a problem document."""
        return self.problem.type if self.problem else None

    @property
    def status(self) -> int | None:
        """The status of the last answer; None if there was none."""
        return self.problem.status if self.problem else None

    @property
    def detail(self) -> str | None:
        """The service's explanation; None if there was no answer."""
        return self.problem.detail if self.problem else None


class InvalidArgumentError(ClientError, PermanentError, ValueError):
    """Raised before a request is sent: a URL, a token, an id, a key or an event is malformed."""


class RefusedError(ClientError, PermanentError):
    """Raised when the service refuses the request, and would again; or failed (500), which a retry would hide."""


class UnexpectedAnswerError(ClientError, PermanentError):
    """Raised when an answer is not one of fiq's: a wrong URL, a captive portal, another version."""


class ClosedError(ClientError, PermanentError):
    """Raised when a client is used after it was closed."""


class GaveUpError(ClientError, TransientError):
    """Raised when the deadline has passed. The same call with the same key may be made again at any time."""
