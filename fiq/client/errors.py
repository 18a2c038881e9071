"""What a call of the client may end in.

::

    FiqError
        ClientError                      carries the problem, and whether the event may be stored
            RefusedError                 (permanent) the service refuses, and would again
            UnexpectedAnswerError        (permanent) what answers is not fiq, or another version of it
            GaveUpError                  (transient) not decided before the deadline: the same call again is safe

No message of any of them holds an event: what they quote of an answer is a problem document, which quotes no request.
"""

from __future__ import annotations

from fiq.client.records import Problem
from fiq.errors import FiqError, PermanentError, TransientError


class ClientError(FiqError):
    """Anything that a call of the client ends in; never raised itself.

    Attributes:
        problem: of the last answer; None when there was none.
        may_be_stored: whether the event, or some of the batch, may be stored all the same. A call with the same key
            finds out, and never stores it twice.
    """

    def __init__(self, message: str, *, problem: Problem | None = None, may_be_stored: bool = False) -> None:
        super().__init__(message)
        self.problem = problem
        self.may_be_stored = may_be_stored

    @property
    def type(self) -> str | None:
        """The problem's type, ``/problems/…``; ``about:blank`` when the answer named none."""
        return self.problem.type if self.problem else None

    @property
    def status(self) -> int | None:
        """The status of the last answer; None when there was none."""
        return self.problem.status if self.problem else None

    @property
    def detail(self) -> str | None:
        """What the service says to it; None when there was no answer."""
        return self.problem.detail if self.problem else None


class RefusedError(ClientError, PermanentError):
    """Raised when the service refuses the request: the same one would be refused again."""


class UnexpectedAnswerError(ClientError, PermanentError):
    """Raised when an answer is none that the contract knows: a wrong URL, a portal in between, another version."""


class GaveUpError(ClientError, TransientError):
    """Raised when the deadline has passed; the same call, with the same key, may be made again at any time."""
