"""Follows one partition through its durable pull consumer: in order, without gaps or repeats.

The sink holds the position, the consumer is only a cursor. At the start, and whenever anything is in doubt, the
consumer is *reset* to what the sink has committed (``$JS.API.CONSUMER.RESET``, ADR-60); its own sequence then starts at
1 and goes up by one a delivery, so a lost, repeated or redelivered message shows at once. A repair never moves the
consumer beyond what is committed: its acknowledgement floor is what trim may delete. What was handed out before the
repair is skipped when it comes again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

import orjson
from nats import errors as nats_errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from services.contract.logs import get_logger
from services.eventlog.errors import LogUnavailableError, PlacementError
from services.eventlog.jetstream.api import JetStreamApi, PermanentApiError
from services.eventlog.jetstream.budget import Budget, Held, Share
from services.eventlog.jetstream.buffer import Buffer
from services.eventlog.jetstream.continuity import check_log
from services.eventlog.jetstream.detour import next_event
from services.eventlog.jetstream.names import STREAM, filter_subject
from services.eventlog.jetstream.pulls import Pulls
from services.eventlog.jetstream.refusals import Refusal, listen
from services.eventlog.protocol import Delivery, LogIdentity

#: how often an idle pull says that it is alive, seconds
HEARTBEAT_SECONDS = 1.0
#: without a message or a heartbeat for this long the consumer is in doubt, seconds
SILENCE_SECONDS = 3.0
#: pause between two repairs that did not help, seconds
REPAIR_PAUSE_SECONDS = 0.25
#: what subject, reply and headers may add to a message's body, bytes
MESSAGE_OVERHEAD_BYTES = 64 * 2**10

#: what ends a pull as planned: nothing there, expired, its messages or its bytes used up
_PLANNED = frozenset({"no messages", "request timeout", "batch completed", "message size exceeds maxbytes"})

#: headers of a status that ends a pull: what it would still have brought
_MISSING_EVENTS = "Nats-Pending-Messages"
_MISSING_BYTES = "Nats-Pending-Bytes"


class JetStreamFollower:
    """One partition of the stream, from a position on.

    Args:
        nc: a connected client.
        consumer: name of the partition's durable consumer.
        partition: its number.
        identity: the log that the sink's position belongs to.
        budget: the memory for events that the followers of this process share.
        on_repair: called with a short reason at each repair, for a counter.
    """

    def __init__(
        self,
        nc: Client,
        consumer: str,
        partition: int,
        identity: LogIdentity,
        *,
        budget: Budget,
        on_repair: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._nc = nc
        self._api = JetStreamApi(nc)
        self._consumer = consumer
        self._pull_subject = f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.{consumer}"
        self._partition = partition
        self._subject_prefix = len(filter_subject(partition)) - 1
        self._identity = identity
        self._budget = budget
        self._largest = nc.max_payload + MESSAGE_OVERHEAD_BYTES
        self._share: Share | None = None
        self._on_repair = on_repair
        self._log = get_logger("follower").bind(consumer=consumer)
        self._subscription: Subscription | None = None
        self._pulls = Pulls(self._largest)
        self._buffer = Buffer()
        self._pending = 0  # what the log held behind the last delivery
        self._wake = asyncio.Event()
        self._committed = 0  # what the sink has: where repairs start
        self._seen = 0  # last sequence put into the buffer: what repairs skip
        self._next_delivery = 1  # consumer sequence that must come next
        self._behind_at = -1  # how many had come when a heartbeat said that more were sent
        self._doubt = ""
        self._progress = True  # something was delivered since the last repair
        self._alive_at = 0.0
        self._error: Exception | None = None
        self._deafen: Callable[[], None] = lambda: None

    async def start(self, after: int) -> None:
        """Deliver everything behind position *after*.

        Raises:
            LogMismatchError: the stream is another one, ends before *after*, or events behind it were trimmed.
            PlacementError: the consumer is gone.
            LogUnavailableError: the broker did not answer.
        """
        self._error = None
        await self._drop_subscription()
        self._hold_nothing()
        if self._share is None:
            self._share = self._budget.join(self._held, largest=self._largest)
        self._committed = self._seen = after
        self._deafen()
        self._deafen = listen(self._nc, self._when_refused)
        await self._begin(after)

    async def batch(self, *, max_events: int, max_bytes: int) -> list[Delivery]:
        """Wait for events and return those that are there, at most *max_events* and about *max_bytes* (at least one).

        Raises:
            LogMismatchError: the stream was re-created.
            PlacementError: the consumer was deleted.
            LogForbiddenError: the user of the connection may not follow the consumer.
        """
        if self._buffer.done() and not self._doubt:
            await self._pull_more()
        while self._error is not None or not self._buffer:
            if self._error is not None:
                raise self._error
            if self._doubt:
                await self._repair()
                continue
            await self._wait()
        events = self._buffer.take(max_events, max_bytes)
        if not self._doubt:
            await self._pull_more()
        return events

    async def acknowledge(self, delivery: Delivery) -> None:
        """Tell the broker that everything up to *delivery* is committed; a lost acknowledgement does no harm."""
        self._committed = max(self._committed, delivery.sequence)
        if not delivery.token:  # the consumer could not deliver it: reset it behind
            self._doubtful("detour")
            return
        with contextlib.suppress(nats_errors.Error):
            await self._nc.publish(delivery.token, b"")

    def advance(self, sequence: int) -> None:
        """Note that the sink has reached *sequence* although no event of the partition stands there.

        The consumer is reset behind it, which moves its floor, so that trim need not stop at an idle partition.
        """
        if sequence > self._committed:
            self._committed = sequence
            self._seen = max(self._seen, sequence)
            self._doubtful("advance")

    def interrupt(self, error: Exception) -> None:
        """Make :meth:`batch` raise *error*."""
        self._error = error
        self._wake.set()

    async def close(self) -> None:
        """Deliver no more."""
        self._deafen()
        await self._drop_subscription()
        self._hold_nothing()
        if self._share is not None:
            self._share.leave()
            self._share = None

    def _when_refused(self, refusal: Refusal) -> None:
        """Give up what would otherwise look like silence, or never be trimmed: pulls, answers, acknowledgements."""
        is_ack = refusal.verb == "publish" and f".{STREAM}.{self._consumer}.".lower() in refusal.subject
        if is_ack or refusal.hits(self._pull_subject, self._pulls.inbox or "-"):
            self.interrupt(refusal.error())

    # -- start and repair ---------------------------------------------------------------------------------------------

    async def _begin(self, after: int) -> None:
        await check_log(self._api, self._consumer, self._identity, after)
        try:
            await self._api.reset_consumer(STREAM, self._consumer, after + 1)
        except PermanentApiError as error:  # the transient ones pass
            raise PlacementError(
                f"the broker would not reset consumer {self._consumer}: {error}; see `nats consumer info`"
            ) from error
        self._doubt = ""
        self._next_delivery = 1
        self._behind_at = -1
        self._pulls.clear()
        inbox = self._nc.new_inbox()
        self._pulls.inbox = inbox
        self._subscription = await self._nc.subscribe(
            f"{inbox}.*", cb=self._receiver(), pending_msgs_limit=-1, pending_bytes_limit=-1
        )
        self._alive_at = time.monotonic()
        await self._pull_more()

    async def _repair(self) -> None:
        reason, self._doubt = self._doubt, ""
        if not self._progress:  # the last repair brought nothing: the cluster is electing
            await asyncio.sleep(REPAIR_PAUSE_SECONDS)
        silent = reason == "silence" and not self._progress
        self._progress = False
        self._on_repair(reason)
        self._log.info("FOLLOWER_REPAIR", reason=reason, committed=self._committed)
        await self._drop_subscription()
        try:
            await self._begin(self._committed)
            if silent:
                await self._make_detour()
        except LogUnavailableError:
            self._doubt = reason

    async def _make_detour(self) -> None:
        """Fetch the next event otherwise: two silences in a row, and perhaps it is one that cannot be delivered."""
        delivery = await next_event(self._nc, self._partition, self._seen)
        if delivery is not None and delivery.sequence > self._seen:
            self._log.warning("EVENT_NOT_DELIVERED", sequence=delivery.sequence)
            self._keep(delivery)

    async def _drop_subscription(self) -> None:
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            with contextlib.suppress(nats_errors.Error):
                await subscription.unsubscribe()

    def _doubtful(self, reason: str) -> None:
        if not self._doubt:
            self._doubt = reason
            self._wake.set()

    # -- waiting and pulling ------------------------------------------------------------------------------------------

    async def _wait(self) -> None:
        left = self._alive_at + SILENCE_SECONDS - time.monotonic()
        if left <= 0:
            self._doubtful("silence")
            return
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left):
                await self._wake.wait()

    def _held(self) -> Held:
        promised = self._pulls.promised
        return Held(
            promised + self._buffer.events,
            self._pulls.promised_bytes + self._buffer.size,
            busy=self._pending > promised,
        )

    def _hold_nothing(self) -> None:
        self._pulls.clear()
        self._buffer.clear()
        self._pending = 0

    async def _pull_more(self) -> None:
        while self._share is not None and (pull := self._pulls.next(self._share.room())) is not None:
            request = {
                "batch": pull.events,
                "max_bytes": pull.max_bytes,
                "expires": Pulls.EXPIRES_NS,
                "idle_heartbeat": int(HEARTBEAT_SECONDS * 1e9),
            }
            if not self._pulls.promised:
                self._alive_at = time.monotonic()
            self._pulls.sent(pull)
            try:
                await self._nc.publish(self._pull_subject, orjson.dumps(request), reply=pull.inbox)
            except nats_errors.Error:
                self._doubtful("connection")
                return

    # -- receiving ----------------------------------------------------------------------------------------------------

    def _receiver(self) -> Callable[[Msg], Awaitable[None]]:
        """Return the callback of one subscription; it is deaf as soon as another one has taken its place."""
        inbox = self._pulls.inbox

        async def receive(message: Msg) -> None:
            if self._doubt or inbox is not self._pulls.inbox:
                return
            self._alive_at = time.monotonic()
            room = self._delivered(message) if message.reply else self._status(message)
            if room and not self._doubt:
                await self._pull_more()

        return receive

    def _delivered(self, message: Msg) -> bool:
        """Take a message; say whether it made room: one that is buffered takes the room that it was promised."""
        tokens = message.reply.split(".")
        # $JS.ACK.<stream>.<consumer>.… or, with domain and account, $JS.ACK.<domain>.<account>.<stream>.<consumer>.…
        offset = 5 if len(tokens) == 9 else 7
        sequence, delivery = int(tokens[offset]), int(tokens[offset + 1])
        if delivery != self._next_delivery:
            self._doubtful("gap" if delivery > self._next_delivery else "repeat")
            return False
        self._next_delivery += 1
        self._pending = int(tokens[offset + 3])
        self._progress = True
        self._pulls.delivered(_wire_size(message))
        if sequence <= self._seen:
            return True  # handed out before the repair
        consultation = message.subject[self._subject_prefix :]
        self._keep(Delivery(sequence, consultation, message.headers, message.data, message.reply))
        return False

    def _keep(self, delivery: Delivery) -> None:
        self._seen = delivery.sequence
        self._buffer.put(delivery)
        self._wake.set()

    def _status(self, message: Msg) -> bool:
        """Read a message of the broker's own; say whether it makes room for another pull."""
        headers = message.headers or {}
        status, text = headers.get("Status", ""), headers.get("Description", "")
        if status == "100":
            self._compare(int(headers.get("Nats-Last-Consumer", self._next_delivery - 1)))
            return False
        if text.lower() in _PLANNED and _MISSING_EVENTS in headers:
            self._pulls.ended(int(headers[_MISSING_EVENTS]), int(headers.get(_MISSING_BYTES, 0)))
        else:  # no responders, leadership change, server shutdown, consumer deleted, …
            self._log.info("PULL_ENDED", status=status, text=text)
            self._doubtful("status")
        return True

    def _compare(self, sent: int) -> None:
        """Compare what a heartbeat says was *sent* with what came.

        Like every status it overtakes messages whose delivery the nodes have not agreed upon yet. So more sent than
        come is a gap only when nothing has come until the next heartbeat.
        """
        came = self._next_delivery - 1
        if sent < came or (sent > came and self._behind_at == came):
            self._doubtful("gap")
        self._behind_at = came if sent > came else -1


def _wire_size(message: Msg) -> int:
    """Return about what the broker counts against ``max_bytes``."""
    headers = sum(len(name) + len(value) + 4 for name, value in (message.headers or {}).items())
    return len(message.data) + headers + len(message.subject) + len(message.reply)
