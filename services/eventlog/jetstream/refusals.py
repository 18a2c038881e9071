"""What the user of a connection may not do.

nats-py raises no permission error: a request runs into its timeout, ``publish`` and ``subscribe`` return as if all were
well. The only sign is a line that the server sends later. Here it ends the request that it is about, at once, and is
passed on to whoever publishes or subscribes without a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from services.contract.lifecycle import cancellable
from services.contract.logs import get_logger
from services.eventlog.errors import LogForbiddenError
from services.eventlog.jetstream.credentials import SEED_VARIABLE
from services.eventlog.jetstream.tolerance import TolerantClient

#: violations that are kept for later messages
_MAX_VIOLATIONS = 20
_VIOLATION = re.compile(r'permissions violation for (publish|subscription) to "([^"]*)"')

_log = get_logger("eventlog.connection")


@dataclass(frozen=True, slots=True)
class Refusal:
    """A permission violation.

    Attributes:
        verb: ``publish`` or ``subscription``.
        subject: in lower case, as nats-py reports it.
    """

    verb: str
    subject: str

    @classmethod
    def parse(cls, text: str) -> Refusal | None:
        """Read what nats-py reports; None when it is about something else."""
        match = _VIOLATION.search(text.lower())
        return cls(match[1], match[2]) if match else None

    def hits(self, subject: str, inbox: str) -> bool:
        """Say whether a request on *subject*, whose answer is awaited below *inbox*, is in vain because of this."""
        if self.verb == "publish":
            return self.subject == subject.lower()
        return self.subject.startswith(inbox.lower())

    def error(self) -> LogForbiddenError:
        """Return what the caller of such a request gets."""
        verb = "publish on" if self.verb == "publish" else "subscribe to"
        return LogForbiddenError(
            f"the NATS user of this process may not {verb} {self.subject}: take the seed of the right role "
            f"({SEED_VARIABLE}), or give the subject to its user in accounts.conf"
        )


RefusalListener = Callable[[Refusal], None]


class RefusalAwareClient(TolerantClient):
    """A client whose requests end at once when its user may not make them.

    Attributes:
        violations: what the server reported, oldest first, each once.
        deaf: the refusal of an inbox of this connection: no answer can arrive until it connects anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self.violations: list[str] = []
        self.deaf: Refusal | None = None
        self._listeners: list[RefusalListener] = []

    def listen(self, listener: RefusalListener) -> Callable[[], None]:
        """Have *listener* called for each refusal from now on; return what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def note(self, refusal: Refusal, text: str) -> None:
        """Pass on what the server reported in *text*."""
        if refusal.verb == "subscription" and refusal.hits("", self._inbox_prefix.decode()):
            self.deaf = refusal
        for listener in list(self._listeners):
            listener(refusal)
        if text in self.violations or len(self.violations) >= _MAX_VIOLATIONS:
            return
        self.violations.append(text)
        _log.error("LOG_PERMISSION_VIOLATION", detail=text, action="give the NATS user of this service the subject")

    def forget(self) -> None:
        """Try what was refused again: this is another connection, perhaps with other permissions."""
        self.deaf = None

    async def request(
        self,
        subject: str,
        payload: bytes = b"",
        timeout: float = 0.5,
        old_style: bool = False,
        headers: dict[str, Any] | None = None,
    ) -> Msg:
        """Do as nats-py does, but do not wait for the answer to what the user may not ask.

        Raises LogForbiddenError: the user may not publish on *subject*, or not hear the answer.
        """
        if self.deaf is not None:
            raise self.deaf.error()
        refused: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        inbox = self._inbox_prefix.decode()

        def listener(refusal: Refusal) -> None:
            if refusal.hits(subject, inbox) and not refused.done():
                refused.set_result(refusal)

        answer: asyncio.Future[Any] = asyncio.ensure_future(
            super().request(subject, payload, timeout, old_style, headers)
        )
        deafen = self.listen(listener)
        try:
            await asyncio.wait({answer, refused}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise refused.result().error()
            message: Msg = answer.result()
            return message
        finally:
            deafen()
            answer.cancel()


def listen(nc: Client, listener: RefusalListener) -> Callable[[], None]:
    """Have *listener* called for each refusal of *nc*, if that is a client that knows them; return what ends that."""
    return nc.listen(listener) if isinstance(nc, RefusalAwareClient) else _nothing


async def check_hearing(nc: Client, *, timeout: float) -> None:
    """Make sure that the inboxes subscribed to so far are heard; the broker answers in turn, so a round trip tells.

    It takes two: nats-py writes the PING of a flush past the buffer in which the subscriptions may still wait.

    Raises LogForbiddenError: the user may not listen to them.
    """
    with contextlib.suppress(nats.errors.Error, OSError):  # what the connection lacks otherwise, others will find out
        for _ in range(2):
            await cancellable(nc.flush(timeout=timeout))  # type: ignore[arg-type]  # annotated int, used in wait_for()
    must_hear(nc)


def must_hear(nc: Client) -> None:
    """Raise LogForbiddenError when answers on *nc* cannot arrive."""
    if isinstance(nc, RefusalAwareClient) and nc.deaf is not None:
        raise nc.deaf.error()


def _nothing() -> None:
    pass
