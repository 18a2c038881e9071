"""Follows one partition through a cursor of its own: in order, without gaps or repeats.

**Position.** The sink holds it; the cursor is disposable. At the start, and whenever anything is in doubt, the log is
compared with the position and a new cursor is made at what the sink has committed. A cursor numbers its deliveries from
1, so a lost, repeated or foreign message shows at once. What was handed out before a repair is skipped when it comes
again.

**Doubt** is a gap or a repeat, an unplanned status, a new connection (all nodes may have been set back meanwhile), or
silence: a pull that waits reports twice a second. The first doubt ends the old cursor: its inbox is dropped and its
messages are ignored, also when its frozen node thaws and delivers again.

**Cursor.** A pull consumer with one replica, in memory. When it is in doubt, or its node is gone, the owner makes
another one instead of waiting. Each has a *generation* in its name and an inbox of its own, because a frozen node that
thaws brings the old one back for a moment. The next generation is one more than the highest that ``CONSUMER.NAMES``
shows: the meta leader answers that alone, so other cursors and dead nodes delay no partition. Older generations are
deleted in the background; only the node of a cursor answers its deletion, so one on a dead node runs into the timeout
and takes effect all the same. ``inactive_threshold`` removes what is left.

**The same log?** A stream that was deleted and created anew has another creation time. One that was set back has not:
nodes whose disks were restored from an older copy come up with the old stream, and what clients post next gets
sequences under which the sink has other events. So the sink keeps the message id with the sequence, and the stream's
leader is asked for it. Only what persists for a while counts: a newly elected leader may not have applied all that its
predecessor acknowledged, and a deposed one may not know that it is.

**Pulls** are pipelined: the next one is sent before the last is finished. What is *promised* is what was asked for and
neither arrived nor was declined by the broker. Open requests are served in turn, so messages cannot be told apart by
request; only the sums are known, and they suffice. The memory for promises, for what waits and for what was taken is
shared by the followers of the process (:class:`Budget`).

**Idle partitions.** Each heartbeat reports, in one message of one node, how far the cursor has looked through the
stream and how much it has sent. When all that has come, nothing of the partition lies between the last delivery and
that sequence: what a node has applied is final. Two answers cannot prove that: they may be of two nodes, one of them
deposed or late, however often the leader's name is compared. (Measured: a consumer without anything pending, together
with the stream's last sequence, as the proof lost 2 of 4,000 events at a failover.)

**Undeliverable events.** nats-server 2.15.1 stores a subject with a carriage return, but its routes do not carry it:
the node that receives it closes the route, the cursor on the other side falls silent, and the next one meets the same
message. The API answers in JSON, which escapes it; so the message is read there and can be set aside like any poison.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import orjson
from nats import errors as nats_errors
from nats.aio.subscription import Subscription

from fiq.errors import PermanentError
from fiq.event import message_id_at
from services.core.logs import get_logger
from services.core.retry import retry
from services.log.errors import LogMismatchError, LogRefusedError, LogUnavailableError
from services.log.jetstream.api import STREAM_NOT_FOUND, JetStreamApi, PermanentApiError
from services.log.jetstream.connection import Connection, Received, Refusal
from services.log.jetstream.stream import STREAM, cursor_config, filter_subject, parse_cursor_name
from services.log.partitions import partition_name
from services.log.protocol import Delivery, LogIdentity, Outcome, Position

#: how often an idle pull says that it is alive, seconds
HEARTBEAT_SECONDS = 0.5
#: without a message or a heartbeat for this long the cursor is in doubt, seconds
SILENCE_SECONDS = 2.0
#: pause between two repairs that did not help, seconds
REPAIR_PAUSE_SECONDS = 0.25
#: how long an answer may take; short, as it may be a frozen node's and another one answers soon, seconds
REQUEST_SECONDS = 2.0
#: a pull that found nothing ends after this time and is renewed, seconds
PULL_SECONDS = 30.0
#: one pull brings at most these
MAX_EVENTS = 8192
MAX_BYTES = 16 * 2**20
#: what subject, reply and headers may add to a message's body, bytes
MESSAGE_OVERHEAD_BYTES = 64 * 2**10

#: a pull is worth sending when it can bring this part of what may be held in all
_WORTH = 4
#: what ends a pull as planned: nothing there, expired, its messages or its bytes used up
_PLANNED = frozenset({"no messages", "request timeout", "batch completed", "message size exceeds maxbytes"})
#: headers of a status that ends a pull: what it would still have brought
_MISSING_EVENTS = "Nats-Pending-Messages"
_MISSING_BYTES = "Nats-Pending-Bytes"
#: headers of a heartbeat: how many messages the cursor has sent, and up to which sequence it has looked
_SENT = "Nats-Last-Consumer"
_LOOKED = "Nats-Last-Stream"

#: how long the making of a cursor may take, by attempt, seconds: milliseconds unless the broker chose a dead node, and
#: the next one may be on another. The last value repeats: the cluster may only be slow
CREATE_SECONDS = (1.0, 1.0, 2.0, 5.0)
#: pause before another attempt to delete old cursors, doubled each time, and the longest, seconds
_DELETE_SECONDS, _MAX_DELETE_SECONDS = 2.0, 60.0

#: refusals after which another attempt may succeed: a consumer of this name exists with another configuration (an
#: attempt that timed out took effect), no node can hold it now, or the stream is gone, which the next look explains
_TRY_AGAIN = frozenset({10148, 10005, STREAM_NOT_FOUND})

#: pause between two checks of a log that cannot be followed, seconds
PAUSE_SECONDS = 0.5
#: a log is refused when it cannot be followed for this long, seconds
MISMATCH_SECONDS = 2.0
#: the same for one that ends before the file does, seconds: after a restart of all nodes the leader may still be
#: applying what it has
LAG_SECONDS = 30.0

_WAY_FORWARD = (
    "The partition stops, so nothing is skipped. To go on without losing an event of either: docs/operations.md, "
    "`A log that was set back`"
)

#: the floors take this part of the whole together
_FLOORS = 4

_log = get_logger("cursor")


class JetStreamFollower:
    """One partition of the stream, from a position on; see :class:`services.log.protocol.Follower`.

    Args:
        nc: a connected client.
        store: whose corpus it is.
        partition: its number.
        identity: the log that the sink's position belongs to.
        budget: the memory for events that the followers of this process share.
        trimmable: up to which sequence trim may have deleted the partition's events: what its placement says is
            committed; None: not known.
        on_events: called when there is something new to take.
        on_repair: called with a short reason at each repair, for a counter.
    """

    def __init__(
        self,
        nc: Connection,
        store: str,
        partition: int,
        identity: LogIdentity,
        *,
        budget: Budget,
        trimmable: int | None = None,
        on_events: Callable[[], None] = lambda: None,
        on_repair: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._nc = nc
        self._partition = partition
        self._identity = identity
        self._trimmable = trimmable
        self._budget = budget
        self._on_events = on_events
        self._on_repair = on_repair
        self._api = JetStreamApi(nc, timeout=REQUEST_SECONDS)
        self._cursors = Cursors(self._api, store, partition)
        self._subject_prefix = len(filter_subject(partition)) - 1
        self._log = get_logger("follower").bind(store=store, partition=partition_name(partition))
        # what the sink has, and what was found for it
        self._committed = Position(0)  # where repairs start
        self._seen = 0  # last sequence put into the buffer: what repairs skip
        self._last: Delivery | None = None  # what was put there last
        self._handed_out: Delivery | None = None  # the same before a repair: it must come again
        self._buffer = _Buffer()
        # the cursor
        self._consumer = ""
        self._subscription: Subscription | None = None
        self._connects = 0  # how often the client had connected again when the cursor was made
        self._next_delivery = 1  # consumer sequence that must come next
        self._again = 0  # deliveries that the one before had brought already
        self._pending = 0  # what the log held after the last delivery
        self._missing_at = -1  # how many had come when a heartbeat said that more were sent
        self._empty_to = 0  # up to where the cursor has looked and found nothing after what it delivered
        # pulls
        self._largest = nc.max_payload + MESSAGE_OVERHEAD_BYTES
        self._pulls = _Pulls(self._largest)
        self._share: Share | None = None
        self._wants_more = False  # room was made where nothing can be sent
        # life
        self._wake = asyncio.Event()
        self._alive_at = 0.0
        self._doubt = ""
        self._progress = True  # something was delivered since the last repair
        self._error: Exception | None = None
        self._stop_listening: Callable[[], None] = lambda: None

    # -- what the sink calls ------------------------------------------------------------------------------------------

    async def start(self, after: Position) -> None:
        self._error, self._doubt = None, ""
        await self._drop_subscription()
        self._hold_nothing()
        if self._share is None:
            self._share = self._budget.join(self._held, largest=self._largest)
        self._committed, self._seen, self._last = after, after.sequence, None
        self._stop_listening()
        self._stop_listening = self._nc.listen(self._when_refused)
        await self._begin()

    async def run(self) -> None:
        while True:
            if self._error is not None:
                raise self._error
            if self._doubt:
                await self._repair()
                continue
            if self._wants_more:
                await self._pull_more()
            await self._wait()

    def take(self, *, max_events: int, max_bytes: int) -> list[Delivery]:
        if self._buffer.done():
            self._want_more()
        return self._buffer.take(max_events, max_bytes)

    @property
    def ready(self) -> int:
        return len(self._buffer)

    @property
    def waiting(self) -> int:
        held = self._buffer.events
        # a new cursor counts as pending what is held here already, until it has delivered it again
        return self._pending + (min(held, self._again) if self._is_repeating else held)

    @property
    def delivered(self) -> int:
        return self._buffer.events

    @property
    def writers_wait(self) -> bool:
        """False: the broker has answered them."""
        return False

    @property
    def in_doubt(self) -> bool:
        lost = not self._nc.is_connected or self._subscription is None
        return lost or self._is_elsewhere or bool(self._doubt)

    async def acknowledge(self, delivery: Delivery, outcomes: Mapping[int, Outcome]) -> None:
        self._buffer.done()
        if delivery.sequence > self._committed.sequence:
            self._committed = Position(delivery.sequence, message_id_at(delivery.headers))
        if not delivery.token:  # no cursor could deliver it: go on after it
            self._doubtful("undeliverable")
            return
        with contextlib.suppress(nats_errors.Error):
            await self._nc.publish(delivery.token, b"")
        if not self._doubt:
            await self._pull_more()

    async def empty_up_to(self) -> Position:
        reached = self._empty_to
        if self._doubt or reached <= self._committed.sequence or self._seen > self._committed.sequence:
            return self._committed
        message = await self._api.leader_message(STREAM, reached)
        if message is None or self._is_elsewhere or reached <= self._committed.sequence:
            return self._committed  # it was trimmed meanwhile, or may be another log's
        return Position(reached, message_id_at(message["headers"]))

    def advance(self, position: Position) -> None:
        if position.sequence > self._committed.sequence:
            self._committed = position
            self._seen = max(self._seen, position.sequence)

    def interrupt(self, error: Exception) -> None:
        self._error = error
        self._wake.set()

    async def close(self) -> None:
        """Deliver no more. The cursor stays: operators see in it how much waits."""
        self._stop_listening()
        self._cursors.stop_deleting()
        await self._drop_subscription()
        self._hold_nothing()
        if self._share is not None:
            self._share.leave()
            self._share = None

    def _when_refused(self, refusal: Refusal) -> None:
        """End on a refusal of pulls, their answers or acknowledgements, which would otherwise look like silence."""
        is_ack = refusal.verb == "publish" and f".{STREAM}.{self._consumer}.".lower() in refusal.subject
        if is_ack or refusal.hits(self._pull_subject, self._pulls.inbox or "-"):
            self.interrupt(refusal.error())

    # -- start and repair ---------------------------------------------------------------------------------------------

    @property
    def _pull_subject(self) -> str:
        return f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.{self._consumer}"

    async def _begin(self) -> None:
        """Check that this is the right log, and make a cursor at the committed position."""
        connects = self._nc.stats["reconnects"]
        await check_log(self._api, self._identity, self._committed, trimmable=self._trimmable)
        committed = self._committed.sequence
        self._consumer, self._pending = await self._cursors.make(committed)
        self._connects = connects
        self._next_delivery = 1
        self._again = 0
        self._handed_out = self._last if self._seen > committed else None
        self._missing_at = -1
        inbox = self._nc.new_inbox()
        self._pulls.begin(inbox)
        self._subscription = await self._nc.subscribe_directly(f"{inbox}.*", self._receiver(inbox))
        await self._pull_more()

    async def _repair(self) -> None:
        reason = self._doubt
        if not self._progress:  # the last repair brought nothing: the cluster is electing
            await asyncio.sleep(REPAIR_PAUSE_SECONDS)
        silent = reason == "silence" and not self._progress
        self._progress = False
        self._on_repair(reason)
        self._log.info("FOLLOWER_REPAIR", reason=reason, consumer=self._consumer, committed=self._committed.sequence)
        await self._drop_subscription()
        self._doubt = ""
        try:
            await self._begin()
        except LogUnavailableError:
            self._doubt = reason
            return
        if silent:
            await self._read_undeliverable()

    async def _read_undeliverable(self) -> None:
        """Read the next event through the API: after two silences in a row it may be one that cannot be delivered."""
        with contextlib.suppress(LogUnavailableError):
            found = await self._api.leader_message(STREAM, self._seen + 1, next_of=filter_subject(self._partition))
            if found is not None and found["seq"] > self._seen:
                self._log.warning("EVENT_NOT_DELIVERED", sequence=found["seq"])
                consultation = found["subject"][self._subject_prefix :]
                self._keep(Delivery(found["seq"], consultation, found["headers"] or None, found["data"], token=""))

    def _hold_nothing(self) -> None:
        self._buffer.clear()
        self._pending = 0

    async def _drop_subscription(self) -> None:
        self._pulls.end()
        self._empty_to = 0
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            with contextlib.suppress(nats_errors.Error):
                await self._nc.unsubscribe_directly(subscription)

    def _doubtful(self, reason: str) -> None:
        if not self._doubt:
            self._doubt = reason
            self._wake.set()

    # -- waiting and pulling ------------------------------------------------------------------------------------------

    async def _wait(self) -> None:
        """Wait until there is something to do, or a pull is silent."""
        self._wake.clear()
        if self._error is not None or self._doubt or self._wants_more:
            return
        left = self._alive_at + SILENCE_SECONDS - time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left if self._pulls.promised else HEARTBEAT_SECONDS):
                await self._wake.wait()
        if self._pulls.promised and time.monotonic() - self._alive_at >= SILENCE_SECONDS:
            self._doubtful("silence")

    def _want_more(self) -> None:
        self._wants_more = True
        self._wake.set()

    def _held(self) -> Held:
        promised = self._pulls.promised
        return Held(
            promised + self._buffer.events,
            self._pulls.promised_bytes + self._buffer.size,
            busy=self._pending > promised,
        )

    async def _pull_more(self) -> None:
        self._wants_more = False
        while self._share is not None and self._pulls.inbox:
            pull = self._pulls.next(self._share.room())
            if pull is None:
                return
            events, size, inbox = pull
            request = {
                "batch": events,
                "max_bytes": size,
                "expires": int(PULL_SECONDS * 1e9),
                "idle_heartbeat": int(HEARTBEAT_SECONDS * 1e9),
            }
            if not self._pulls.promised:
                self._alive_at = time.monotonic()
            self._pulls.sent(events, size)
            try:
                await self._nc.publish(self._pull_subject, orjson.dumps(request), reply=inbox)
            except nats_errors.Error:
                self._doubtful("connection")
                return

    # -- receiving ----------------------------------------------------------------------------------------------------

    def _receiver(self, inbox: str) -> Callable[[Received], None]:
        """Return the callback of one cursor; it ignores messages once another cursor has taken its place."""

        def receive(message: Received) -> None:
            if self._doubt or inbox != self._pulls.inbox:
                return
            if self._is_elsewhere:
                self._doubtful("reconnect")
                return
            self._alive_at = time.monotonic()
            room = self._delivered(message) if message.reply else self._status(message)
            if room and not self._doubt:
                self._want_more()

        return receive

    @property
    def _is_elsewhere(self) -> bool:
        """Whether the client has reconnected since the log was compared: all nodes may have been set back."""
        return self._nc.stats["reconnects"] != self._connects

    def _delivered(self, message: Received) -> bool:
        """Take a message; return whether it made room: one that is buffered takes the room that it was promised."""
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
        if self._handed_out is not None and sequence >= self._handed_out.sequence:
            self._check_handed_out(self._handed_out, sequence, message)
        if sequence <= self._seen:
            self._again += 1
            return True  # handed out before the repair
        consultation = message.subject[self._subject_prefix :]
        self._keep(Delivery(sequence, consultation, message.headers, message.data, message.reply))
        return False

    def _check_handed_out(self, last: Delivery, sequence: int, message: Received) -> None:
        """Compare the *last* event that was handed out before the repair with what the log has in its place."""
        self._handed_out = None
        if (sequence, message_id_at(message.headers)) != (last.sequence, message_id_at(last.headers)):
            self.interrupt(
                LogUnavailableError(
                    f"the log no longer has the event that came at sequence {last.sequence}: beginning again after "
                    "the committed one"
                )
            )

    @property
    def _is_repeating(self) -> bool:
        """Whether everything that this cursor has delivered was in the buffer, or beyond it, before."""
        return self._next_delivery - 1 == self._again

    def _keep(self, delivery: Delivery) -> None:
        self._seen, self._last = delivery.sequence, delivery
        self._buffer.put(delivery)
        self._on_events()

    def _status(self, message: Received) -> bool:
        """Read a message of the broker's own; return whether it makes room for another pull."""
        headers = message.headers or {}
        status, text = headers.get("Status", ""), headers.get("Description", "")
        if status == "100":
            came = self._next_delivery - 1
            self._compare(int(headers.get(_SENT, came)), int(headers.get(_LOOKED, 0)))
            return False
        if text.lower() in _PLANNED and _MISSING_EVENTS in headers:
            self._pulls.ended(int(headers[_MISSING_EVENTS]), int(headers.get(_MISSING_BYTES, 0)))
        else:  # no responders, leadership change, server shutdown, consumer deleted, …
            self._log.info("PULL_ENDED", status=status, text=text)
            self._doubtful("status")
        return True

    def _compare(self, sent: int, looked: int) -> None:
        """Compare what a heartbeat says was *sent*, while the cursor *looked* up to a sequence, with what came.

        It overtakes messages between two nodes. So more sent than come is a gap only when nothing has come until the
        next heartbeat.
        """
        came = self._next_delivery - 1
        if sent < came or (sent > came and self._missing_at == came):
            self._doubtful("gap")
        self._missing_at = came if sent > came else -1
        if sent == came:
            self._empty_to = looked


class _Buffer:
    """Deliveries in order; what was taken counts until it is done.

    Attributes:
        events: how many it holds.
        size: bytes of their bodies.
    """

    def __init__(self) -> None:
        self._waiting: deque[Delivery] = deque()
        self._taken = self._taken_size = 0
        self.events = self.size = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, delivery: Delivery) -> None:
        self._waiting.append(delivery)
        self.events += 1
        self.size += len(delivery.body)

    def take(self, max_events: int, max_bytes: int) -> list[Delivery]:
        """Return those that wait, at most *max_events* and about *max_bytes*, at least one if any; they are in hand."""
        taken: list[Delivery] = []
        size = 0
        waiting = self._waiting
        while waiting and len(taken) < max_events and (not taken or size + len(waiting[0].body) <= max_bytes):
            delivery = waiting.popleft()
            size += len(delivery.body)
            taken.append(delivery)
        self._taken, self._taken_size = len(taken), size
        return taken

    def done(self) -> bool:
        """Release what was taken last; return whether there was anything."""
        taken = self._taken
        self.events -= taken
        self.size -= self._taken_size
        self._taken = self._taken_size = 0
        return taken > 0

    def clear(self) -> None:
        self._waiting.clear()
        self._taken = self._taken_size = self.events = self.size = 0


class _Pulls:
    """The pull requests of one cursor.

    Args:
        largest: bytes of the largest message: a request that could not bring it would end at once, again and again.

    Attributes:
        inbox: where all answers go, each request's under a number of its own; empty without a cursor.
        promised: how many events may still come.
        promised_bytes: the same in bytes, about.
    """

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._number = 0
        self.inbox = ""
        self.promised = self.promised_bytes = 0

    def begin(self, inbox: str) -> None:
        """Ask through *inbox* from now on, with nothing in flight."""
        self.inbox = inbox
        self.promised = self.promised_bytes = 0

    def end(self) -> None:
        """Ignore all answers from now on."""
        self.begin("")

    def next(self, room: Room) -> tuple[int, int, str] | None:
        """Return events, bytes and inbox of a request to send now; None when *room* makes none worth it."""
        least_events, least_size = 1, self._largest
        if self.promised:  # without a request in flight any is worth it
            least_events = max(least_events, min(room.all_events // _WORTH, MAX_EVENTS // 2))
            least_size = max(least_size, min(room.all_size // _WORTH, MAX_BYTES // 2))
        if room.events < least_events or room.size < least_size:
            return None
        self._number += 1
        most = max(MAX_BYTES, self._largest)
        return min(room.events, MAX_EVENTS), min(room.size, most), f"{self.inbox}.{self._number}"

    def sent(self, events: int, size: int) -> None:
        """Note that a request for *events* and *size* bytes is in flight."""
        self.promised += events
        self.promised_bytes += size

    def delivered(self, size: int) -> None:
        """Note one message of *size* bytes, as the broker counts them: subjects and headers included."""
        self._less(1, size)

    def ended(self, events: int, size: int) -> None:
        """Note that the broker ended a request, of which *events* and *size* bytes will not come.

        That says nothing about messages in flight: it overtakes them between nodes. (Measured with a replicated
        consumer: 14 requests ended before the first of their messages came.)
        """
        self._less(events, size)

    def _less(self, events: int, size: int) -> None:
        self.promised = max(0, self.promised - events)
        # the sizes are ours and the broker's: what they differ by must not add up
        self.promised_bytes = max(0, self.promised_bytes - size) if self.promised else 0


def _wire_size(message: Received) -> int:
    """Return about what the broker counts against ``max_bytes``."""
    headers = sum(len(name) + len(value) + 4 for name, value in (message.headers or {}).items())
    return len(message.data) + headers + len(message.subject) + len(message.reply)


# -- the cursor --------------------------------------------------------------------------------------------------------


class Cursors:
    """Makes the cursors of one partition of one store, each with the next generation.

    A request during an election is never answered and must be repeated after it, so *api* has a short timeout.
    """

    def __init__(self, api: JetStreamApi, store: str, partition: int) -> None:
        self._api = api
        self._store = store
        self._partition = partition
        self._generation = 0
        self._failures = 0  # cursors in a row whose making got no answer
        self._deleting: asyncio.Task[None] | None = None

    async def make(self, after: int) -> tuple[str, int]:
        """Make a cursor after sequence *after*; return its name, and how many events there are for it.

        Raises LogUnavailableError: no answer in time, or the cluster cannot now; another call makes one of another
        generation, as this one may exist; PermanentApiError: the broker refuses.
        """
        try:
            self._generation = max([self._generation, *await self._generations()]) + 1
            config = cursor_config(self._store, self._partition, self._generation, after + 1)
            timeout = CREATE_SECONDS[min(self._failures, len(CREATE_SECONDS) - 1)]
            self._failures += 1
            info = await self._api.create_consumer(STREAM, config, timeout=timeout)
            self._failures = 0
        except PermanentApiError as error:
            if error.err_code in _TRY_AGAIN:
                raise LogUnavailableError(str(error)) from error
            raise
        self.stop_deleting()
        self._deleting = asyncio.create_task(self._delete_old(), name=f"delete old cursors of {self._partition}")
        return config["name"], int(info["num_pending"])

    def stop_deleting(self) -> None:
        if self._deleting is not None:
            self._deleting.cancel()
            self._deleting = None

    async def _generations(self) -> dict[int, str]:
        found = {}
        for name in await self._api.consumer_names(STREAM):
            parsed = parse_cursor_name(name)
            if parsed is not None and parsed[:2] == (self._store, self._partition):
                found[parsed[2]] = name
        return found

    async def _delete_old(self) -> None:
        """Delete every cursor of the partition before the newest one."""

        async def delete() -> None:
            for number, name in (await self._generations()).items():
                if number < self._generation:
                    await self._api.delete_consumer(STREAM, name)

        try:
            await retry(delete, on=LogUnavailableError, pause=_DELETE_SECONDS, longest=_MAX_DELETE_SECONDS)
        except LogRefusedError as error:  # a permission, mostly: they go by themselves in a day
            _log.warning("CURSORS_NOT_DELETED", partition=self._partition, reason=str(error))


# -- whether it is the same log ----------------------------------------------------------------------------------------


async def check_log(api: JetStreamApi, identity: LogIdentity, after: Position, *, trimmable: int | None) -> None:
    """Check that the log can be followed from *after*.

    Args:
        api: of a connection.
        identity: of the log that the position belongs to.
        after: what the sink has.
        trimmable: up to which sequence trim may have deleted the partition's events; None: perhaps every one that the
            stream no longer holds.

    Raises LogMismatchError: the stream is another one, was set back, or events after *after* are gone;
    LogUnavailableError: no answer.
    """
    started = time.monotonic()
    while True:
        try:
            return await _check(api, identity, after, trimmable)
        except _EndsEarlyError as error:
            if time.monotonic() - started >= LAG_SECONDS:
                raise LogMismatchError(str(error)) from None
        except _NotThereError:
            if time.monotonic() - started >= PAUSE_SECONDS:  # the second look: trimmed, or deleted by an operator
                return None
        except PermanentError:
            if time.monotonic() - started >= MISMATCH_SECONDS:
                raise
        await asyncio.sleep(PAUSE_SECONDS)


class _EndsEarlyError(Exception):
    """The log ends before the position: set back, or not applied yet."""


class _NotThereError(Exception):
    """The log holds no message at the position, although it holds earlier and later ones."""


async def _check(api: JetStreamApi, identity: LogIdentity, after: Position, trimmable: int | None) -> None:
    found = await api.leader_message(STREAM, after.sequence) if after.message_id else None
    # after the message: what was trimmed in between is then seen as trimmed
    stream = await api.stream_info(STREAM)
    if stream is None:
        raise LogMismatchError(f"stream {STREAM} does not exist: see docs/operations.md, `A lost stream`")
    if (present := LogIdentity(STREAM, stream["created"])) != identity:
        raise LogMismatchError(
            f"stream {STREAM} was created at {present.created}, but this partition's file belongs to the one "
            f"created at {identity.created}: begin a new corpus in another directory, and keep this one; "
            "see docs/operations.md, `A lost stream`"
        )
    first, last = stream["state"]["first_seq"], stream["state"]["last_seq"]
    if after.sequence > last:
        raise _EndsEarlyError(
            f"stream {STREAM} ends at sequence {last}, but this partition's file holds events up to {after.sequence}: "
            f"the stream was set back (were disks restored from an older copy?). Those after {last} are only in HDF5, "
            f"and perhaps some before. {_WAY_FORWARD}"
        )
    if _may_lack(after.sequence, trimmable, first, stream["state"].get("num_deleted", 0)):
        raise LogMismatchError(
            f"the corpus ends at sequence {after.sequence} but stream {STREAM} begins at {first}: the "
            "partition file is an old copy, or the stream was purged; put the newest copy in its place"
        )
    if not after.message_id:
        return
    if found is not None and message_id_at(found["headers"]) != after.message_id:
        raise LogMismatchError(
            f"sequence {after.sequence} of stream {STREAM} is not the event that this partition's file has there: "
            "the stream was set back (were disks restored from an older copy?) and has grown since. The last events "
            f"of the file, up to {after.sequence}, are only in HDF5, and what clients posted since is only in the "
            f"stream. {_WAY_FORWARD}"
        )
    if found is None and first <= after.sequence:
        raise _NotThereError


def _may_lack(sequence: int, trimmable: int | None, first: int, deleted: int) -> bool:
    """Return whether events of the partition after *sequence* may be gone.

    Trim deletes up to *trimmable*, from the stream's beginning or, around a partition that stands still, in its middle.
    A new file may begin anywhere.
    """
    if sequence == 0 or (trimmable is not None and sequence >= trimmable):
        return False
    return sequence < first - 1 or (trimmable is not None and deleted > 0)


# -- the memory for events ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Held:
    """What a follower holds.

    Attributes:
        events: asked for, waiting, and being worked on.
        size: the same in bytes, about.
        busy: whether the log has more than was asked for.
    """

    events: int
    size: int
    busy: bool


@dataclass(frozen=True, slots=True)
class Room:
    """What a follower may ask for.

    Attributes:
        events: now.
        size: now, bytes.
        all_events: if it held nothing.
        all_size: if it held nothing, bytes.
    """

    events: int
    size: int
    all_events: int
    all_size: int


class Budget:
    """The memory of a process for events, shared by its followers: busy ones get more, idle ones keep a minimum.

    A follower *holds* what it has promised to take (its pull requests), what has come and waits, and the batch that is
    being worked on. Each may always hold its *floor*, so none starves, and none waits for another, so nothing can lock
    up. What the floors leave is shared equally by those that have more to fetch than they asked for: one busy partition
    of sixteen gets nearly all of it. When another one becomes busy the first keeps what it holds until that is written,
    and is granted no more than its new part.

    Args:
        events: that its followers hold together, at most; for a moment a quarter more when some join.
        size: the same in bytes; the floors may exceed it when messages may be large.
    """

    def __init__(self, events: int, size: int) -> None:
        self._events = events
        self._size = size
        self._members: dict[Share, None] = {}

    def join(self, held: Callable[[], Held], *, largest: int) -> Share:
        """Add a follower: *held* returns what it holds; its floor has room for two messages of *largest* bytes."""
        share = Share(self, held, largest)
        self._members[share] = None
        return share

    def leave(self, share: Share) -> None:
        """Remove a follower, which no longer holds anything. Idempotent."""
        self._members.pop(share, None)

    def room(self, share: Share) -> Room:
        """Return what the follower with *share* may ask for."""
        held = {one: one.held() for one in self._members}
        busy = max(1, sum(one.busy for one in held.values()))
        own = held[share]
        events, all_events = _room(
            self._events, [one.events for one in held.values()], own.events, self._floor_events(), busy, own.busy
        )
        size, all_size = _room(
            self._size, [one.size for one in held.values()], own.size, self._floor_size(share), busy, own.busy
        )
        return Room(events, size, all_events, all_size)

    def _floor_events(self) -> int:
        return max(1, self._events // (_FLOORS * len(self._members)))

    def _floor_size(self, share: Share) -> int:
        return max(2 * share.largest, self._size // (_FLOORS * len(self._members)))


class Share:
    """One follower's part in a :class:`Budget`."""

    __slots__ = ("_budget", "held", "largest")

    def __init__(self, budget: Budget, held: Callable[[], Held], largest: int) -> None:
        self._budget = budget
        self.held = held
        self.largest = largest

    def room(self) -> Room:
        return self._budget.room(self)

    def leave(self) -> None:
        self._budget.leave(self)


def _room(total: int, held: list[int], own: int, floor: int, busy: int, is_busy: bool) -> tuple[int, int]:
    """Return how much one may add to its *own*, and how much it might hold in all."""
    pool = max(0, total - floor * len(held))
    part = pool // busy if is_busy else 0
    free = pool - sum(max(0, one - floor) for one in held)
    above = max(0, own - floor)
    return max(0, floor - own) + max(0, min(free, part - above)), floor + part
