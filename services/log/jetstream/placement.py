"""Which volume has each partition of each store: keys of the bucket ``fi-partitions``, which ``nats kv`` shows.

::

    <store>.<pp>   {"volume": UUID, "epoch": 1, "committed": 0, "message_id": "", "begins": 1, "stream_created": ...}
    <store>        {"formed": true, "volumes": [UUID, ...], "stream_created": ...}; false: it is about to begin
    _stores        {"stores": [name, ...], "stream_created": ...}: set by an operator after the bucket was lost

A volume claims a partition by creating its key: the broker lets exactly one claim win. From then on only the owner
changes it, each time expecting the revision that it knows. So a persister whose partition was placed anew, by ``fiq
restore`` or ``fiq give-up``, learns that at its next update. The store's own key says that all of its partitions were
placed once; after that a partition without a key is an error and never claimed.

Sequences are of one stream of events. The values name it by its creation time; a value of another stream counts as if
there were no such key.

Every read that decides is as new as the bucket's leader, or guarded by a revision. A put without an answer may have
taken effect, so the key is read again. A put is a plain publish: all who subscribe to the keys' subjects see it, taken
or refused, which is the hint to read again (docs/adr/0021).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

import nats.errors
import orjson
from nats.aio.msg import Msg
from nats.js.api import Header

from services.core.lifecycle import cancellable
from services.log.errors import LogMismatchError, LogUnavailableError, PlacementError
from services.log.jetstream.api import REQUEST_TIMEOUT_SECONDS, ApiError, JetStreamApi, api_error, inbox
from services.log.jetstream.connection import Connection
from services.log.jetstream.stream import (
    BUCKET,
    BUCKET_PREFIX,
    BUCKET_STREAM,
    LATE_KEY,
    STREAM,
    key_subject,
    placement_key,
)
from services.log.partitions import partition_name
from services.log.settings import LogSettings
from services.log.status import Placement, StorePlacement

#: how long a put or a read of one key may take, seconds
_ANSWER_SECONDS = 2.0
#: how long a replica may take for all keys before the leader is asked for each of them, seconds
_REPLICA_SECONDS = 1.0
#: what keys said this long ago does not count any more for trim: an operator may have placed a partition anew, seconds
KEYS_SECONDS = 2.0
#: a purge that goes by earlier keys may take effect for so long after they changed, seconds
FENCE_SECONDS = KEYS_SECONDS + REQUEST_TIMEOUT_SECONDS
#: attempts of a put whose outcome is unknown, or that lost to an update of the same owner
_TRIES = 5
#: pause before the next one, seconds: the update that it lost to may not be readable yet
_PAUSE_SECONDS = 0.05
#: the same, seconds, where the bucket's leader lacks what we put: a newly elected one may still be applying it
_LAG_PAUSE_SECONDS = 0.5

#: the key has another revision than the put expects; the second one: another put of it is under way
_OTHER_REVISION = frozenset({10071, 10164})
_DIRECT_GET = f"$JS.API.DIRECT.GET.{BUCKET_STREAM}"
_OPERATION = "KV-Operation"
#: key that says that the operator has named every store, after the bucket was lost
_STORES = "_stores"
_KEY = re.compile(r"([a-z0-9]{1,32})(?:\.([0-9]{2}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A key as the bucket has it; revision 0: it has none."""

    revision: int
    value: dict[str, Any] | None

    def of_another(self, stream_created: str) -> bool:
        """Whether it says something about another stream of events, and so nothing about this one."""
        return self.value is not None and self.value.get("stream_created") != stream_created

    def placement(self, partition: int) -> Placement | None:
        try:
            found = self.value or {}
            epoch, committed, begins = (int(found[name]) for name in ("epoch", "committed", "begins"))
            rest = str(found.get("message_id", "")), str(found.get("writer", ""))
            return Placement(partition, str(found["volume"]), epoch, committed, begins, self.revision, *rest)
        except (KeyError, TypeError, ValueError):
            return None


_ABSENT = _Entry(0, None)


class BucketPlacements:
    """The placements of one store's partitions; see :class:`services.log.protocol.Placements`."""

    def __init__(self, nc: Connection, settings: LogSettings) -> None:
        self._nc = nc
        self._api = JetStreamApi(nc)
        self._store = settings.store
        self._partitions = settings.partitions
        self._writer = uuid4().hex
        self._created = ""
        self._known: Mapping[int, Placement] = {}

    @property
    def reconnects(self) -> int:
        return self._nc.reconnects

    @property
    def fence_seconds(self) -> float:
        return FENCE_SECONDS

    def record_of(self, partition: int) -> str:
        return f"key {placement_key(self._store, partition)} of bucket {BUCKET}"

    async def read(self) -> StorePlacement:
        created, first, entries, _ = await _read(self._nc, self._store)
        found = _store(self._store, entries, created, first, range(self._partitions))
        self._created, self._known = created, found.partitions
        return found

    async def claim(self, partition: int, volume: str, epoch: int, *, begins: int) -> Placement:
        wanted = Placement(partition, volume, epoch, begins - 1, begins, 0)
        return await self._create(wanted, over_deleted=False)

    async def place(self, placement: Placement) -> Placement:
        """Place a partition that has no key, or whose key was deleted, for an operator; return where it is now.

        Raises LogUnavailableError: the outcome is not known; call again.
        """
        return await self._create(placement, over_deleted=True)

    async def begin(self) -> bool:
        await self._note(self._store, {"formed": False})
        return bool((await read_stores(self._nc)).keys() - {self._store})

    async def form(self, volumes: Collection[str]) -> None:
        await self._note(self._store, {"formed": True, "volumes": sorted(volumes)})

    async def name_stores(self, others: Collection[str]) -> None:
        """Note that no store but this one and *others* had keys in a bucket that got lost. Idempotent.

        Those of *others* that have no keys yet count as formed: nothing is trimmed before they are placed.

        Raises LogUnavailableError: the outcome is not known; call again.
        """
        for name in sorted(set(others) - (await read_stores(self._nc)).keys()):
            await self._note(name, {"formed": True, "volumes": []})
        await self._note(_STORES, {"stores": sorted({self._store, *others})})

    async def _note(self, key: str, value: Mapping[str, Any]) -> None:
        created = await self._stream_created()
        for _ in range(_TRIES):
            entry, wanted = await self._entry(key), {**value, "stream_created": created}
            if _formed(entry, created) or entry.value == wanted:
                return
            if await self._put(key, wanted, entry.revision) is not None:
                return
        raise LogUnavailableError(f"key {key} of bucket {BUCKET} could not be written")

    async def progress(
        self, placement: Placement, committed: int, message_id: str = "", *, owned: Callable[[], bool] = lambda: True
    ) -> Placement:
        """Put that the file of *placement* has reached *committed*; return the placement as it is now.

        A put that is refused takes over the revision of another process only while *owned*: then that process had the
        file before this one. After the file was released it is the next owner, whose progress must stay.

        Raises PlacementError: the partition was placed anew, its key was deleted, the bucket was set back, or another
        process has put progress since this one did; LogUnavailableError: the outcome is not known, or the file was
        released meanwhile.
        """
        wanted = replace(placement, committed=committed, message_id=message_id, writer=self._writer)
        lacking = False
        for _ in range(_TRIES):
            revision = await self._put_placement(wanted)
            if revision is not None:
                return replace(wanted, revision=revision)
            found = await self.get(wanted.partition)
            lacking = found is None or found.revision < wanted.revision
            if found is None or lacking:
                await asyncio.sleep(_LAG_PAUSE_SECONDS)
                continue
            if (found.volume, found.epoch) != (placement.volume, placement.epoch):
                raise PlacementError(_gone(placement, found))
            of_another = found.writer not in {"", self._writer}
            if of_another and not owned():
                raise LogUnavailableError(
                    f"progress of partition {partition_name(placement.partition)} was not put: its next owner has put "
                    "its own"
                )
            if of_another and placement.writer == self._writer:
                raise PlacementError(
                    f"another process puts the progress of partition {partition_name(placement.partition)}, too: two "
                    f"data directories are volume {placement.volume}, perhaps one is a copy. Stop the persisters of "
                    "the older one, then start those of the other one again"
                )
            if (found.committed, found.message_id, found.writer) == (committed, message_id, self._writer):
                return found  # a put of ours whose answer did not come
            wanted = replace(wanted, revision=found.revision)
        if lacking:
            raise PlacementError(_gone(wanted, found))
        raise LogUnavailableError(f"progress of partition {partition_name(placement.partition)} could not be put")

    async def renew(self, placement: Placement, *, epoch: int, committed: int) -> Placement:
        """Place a partition once more where it is: from now on a file of an older epoch is refused.

        Args:
            placement: as it was read; its ``begins`` is written, too.
            epoch: above that of *placement*.
            committed: what the file that is put there has reached; nothing after it is trimmed.

        Raises PlacementError: the key has changed since *placement* was read; LogUnavailableError: the outcome is not
        known; read again.
        """
        message_id = placement.message_id if committed == placement.committed else ""
        wanted = replace(placement, epoch=epoch, committed=committed, message_id=message_id)
        for _ in range(_TRIES):
            revision = await self._put_placement(wanted)
            if revision is not None:
                return replace(wanted, revision=revision)
            found = await self.get(placement.partition)
            if found is not None and replace(found, revision=wanted.revision) == wanted:
                return found
            if found is None or found.revision != placement.revision:
                raise PlacementError(_gone(placement, found))
        raise LogUnavailableError(f"partition {partition_name(placement.partition)} could not be placed anew")

    async def get(self, partition: int) -> Placement | None:
        """Return where *partition* is as the bucket's leader has it; None when no key says so.

        Raises LogUnavailableError: the broker did not answer.
        """
        created = await self._stream_created()
        entry = await self._entry(placement_key(self._store, partition))
        return None if entry.of_another(created) else entry.placement(partition)

    async def history(self, partition: int) -> tuple[Placement, ...]:
        """Return where the partition was by the kept history of its key, the newest last.

        Raises LogUnavailableError: the broker did not answer.
        """
        created, key = await self._stream_created(), placement_key(self._store, partition)
        found, entry = [], await _leaders(self._api, key, seq=1)
        while entry.revision:
            if not entry.of_another(created) and (placement := entry.placement(partition)) is not None:
                found.append(placement)
            entry = await _leaders(self._api, key, seq=entry.revision + 1)
        return tuple(found)

    @asynccontextmanager
    async def watching(self, on_change: Callable[[], None]) -> AsyncIterator[None]:

        async def look(message: Msg) -> None:
            if self._is_news(message):
                on_change()

        subscription = await self._nc.subscribe(key_subject(">"), cb=look)
        try:
            yield
        finally:
            if not self._nc.is_closed:
                await subscription.unsubscribe()

    def _is_news(self, message: Msg) -> bool:
        store, partition = parse_key(message.subject.removeprefix(f"{BUCKET_PREFIX}."))
        if store != self._store or partition is None:
            return store == self._store
        new, known = _Entry(0, _value(message.headers, message.data)).placement(partition), self._known.get(partition)
        return new is None or known is None or (new.volume, new.epoch) != (known.volume, known.epoch)

    # -- one key ------------------------------------------------------------------------------------------------------

    async def _create(self, wanted: Placement, *, over_deleted: bool) -> Placement:
        created = await self._stream_created()
        for _ in range(_TRIES):
            entry = await self._entry(placement_key(self._store, wanted.partition))
            if entry.revision and not entry.of_another(created):
                found = entry.placement(wanted.partition)
                if found is not None:
                    return found
                if not over_deleted:
                    raise PlacementError(
                        f"the key {placement_key(self._store, wanted.partition)} of bucket {BUCKET} was deleted"
                    )
            revision = await self._put_placement(replace(wanted, revision=entry.revision))
            if revision is not None:
                return replace(wanted, revision=revision)
        raise LogUnavailableError(f"partition {partition_name(wanted.partition)} could not be claimed")

    async def _put_placement(self, wanted: Placement) -> int | None:
        """Put *wanted*, expecting its revision; return the new one, or None: look what the key says now."""
        value = {
            "volume": wanted.volume,
            "epoch": wanted.epoch,
            "committed": wanted.committed,
            "message_id": wanted.message_id,
            "writer": wanted.writer,
            "begins": wanted.begins,
            "stream_created": await self._stream_created(),
        }
        return await self._put(placement_key(self._store, wanted.partition), value, wanted.revision)

    async def _put(self, key: str, value: Mapping[str, Any], expected: int) -> int | None:
        headers = {Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value: str(expected)}
        request = self._nc.request(key_subject(key), orjson.dumps(value), timeout=_ANSWER_SECONDS, headers=headers)
        try:
            answer = orjson.loads((await cancellable(request)).data)
        except (nats.errors.Error, TimeoutError, OSError, orjson.JSONDecodeError):
            answer = {}
        if "seq" in answer and "error" not in answer:
            return int(answer["seq"])
        refusal = api_error(f"put {key} of bucket {BUCKET}", answer.get("error") or {"code": 503})
        if refusal.err_code not in _OTHER_REVISION and not isinstance(refusal, LogUnavailableError):
            raise refusal
        await asyncio.sleep(_PAUSE_SECONDS)
        return None

    async def _entry(self, key: str) -> _Entry:
        return await _leaders(self._api, key)

    async def _stream_created(self) -> str:
        if not self._created:
            self._created = (await _stream(self._api))[0]
        return self._created


async def read_stores(nc: Connection, *, every: bool = False) -> dict[str, StorePlacement]:
    """Return where the partitions of every store are, as new as the bucket's leader has it.

    Args:
        nc: a connected client.
        every: refuse a bucket that may lack a store: one that was made over a stream with events.

    Raises LogMismatchError: there is no stream of events; PlacementError: there is no bucket, or *every* store is
    asked for and an operator has to name them first; LogUnavailableError: the broker did not answer.
    """
    created, first, entries, late = await _read(nc)
    named = entries.get(_STORES, _ABSENT)
    if every and late and (named.value is None or named.of_another(created)):
        raise PlacementError(
            f"bucket {BUCKET} was made when stream {STREAM} had events already, so it may lack stores that had keys in "
            "an earlier one: nothing is trimmed. Name all stores: `fiq place --stores NAME,NAME`; docs/operations.md, "
            "`A lost key`"
        )
    stores = {store for key in entries if (store := parse_key(key)[0])}
    found = {store: _store(store, entries, created, first, range(100)) for store in sorted(stores)}
    return {name: store for name, store in found.items() if store.partitions or _begun(entries, name, created)}


def parse_key(key: str) -> tuple[str, int | None]:
    """Return the store that a key of the bucket is of, and the partition; an empty store for a key that is none."""
    match = _KEY.fullmatch(key)
    if match is None:
        return "", None
    return match[1], None if match[2] is None else int(match[2])


def _store(
    store: str, entries: Mapping[str, _Entry], created: str, first: int, partitions: Collection[int]
) -> StorePlacement:
    placed: dict[int, Placement] = {}
    deleted: set[int] = set()
    for partition in partitions:
        entry = entries.get(placement_key(store, partition), _ABSENT)
        if not entry.revision or entry.of_another(created):
            continue
        if (placement := entry.placement(partition)) is not None:
            placed[partition] = placement
        else:
            deleted.add(partition)
    own = entries.get(store, _ABSENT)
    formed = _formed(own, created)
    volumes = tuple((own.value or {}).get("volumes", ())) if formed else ()
    return StorePlacement(store, formed, volumes, placed, frozenset(deleted), created, first)


def _begun(entries: Mapping[str, _Entry], store: str, created: str) -> bool:
    own = entries.get(store, _ABSENT)
    return own.value is not None and not own.of_another(created)


def _formed(entry: _Entry, created: str) -> bool:
    return entry.value is not None and not entry.of_another(created) and entry.value.get("formed") is True


def _gone(placement: Placement, found: Placement | None) -> str:
    name = partition_name(placement.partition)
    if found is None:
        return f"the key of partition {name} was deleted from bucket {BUCKET}"
    if found.revision < placement.revision:
        return (
            f"bucket {BUCKET} was set back: it has revision {found.revision} of partition {name}, and had revision "
            f"{placement.revision} before (were disks restored from an older copy?); docs/operations.md, "
            "`A log that was set back`"
        )
    if (found.volume, found.epoch) == (placement.volume, placement.epoch):
        return f"partition {name} changed meanwhile: its persister runs (revision {found.revision})"
    return (
        f"partition {name} was placed anew: volume {found.volume}, epoch {found.epoch}; it was on volume "
        f"{placement.volume}, epoch {placement.epoch}"
    )


# -- reading the bucket -----------------------------------------------------------------------------------------------


async def _read(nc: Connection, store: str | None = None) -> tuple[str, int, dict[str, _Entry], bool]:
    """Return the stream's creation time and first sequence, the keys of *store* or all, and if it had events first.

    The bucket's leader says which keys there are and what its last sequence is. One batched direct get brings the
    values; when the replica that answers has less than the leader, the leader is asked for each key instead.
    """
    api = JetStreamApi(nc)
    created, first = await _stream(api)
    bucket = await _bucket(api)
    state, late = bucket["state"], (bucket["config"].get("metadata") or {}).get(LATE_KEY) == created
    keys = [subject.removeprefix(f"{BUCKET_PREFIX}.") for subject in state.get("subjects") or {}]
    keys = [key for key in keys if store is None or parse_key(key)[0] == store]
    if not keys:
        return created, first, {}, late
    found = await _replicas(nc, keys, int(state["last_seq"]))
    if found is None:
        found = dict(zip(keys, await asyncio.gather(*(_leaders(api, key) for key in keys)), strict=True))
    return created, first, found, late


async def _stream(api: JetStreamApi) -> tuple[str, int]:
    info = await api.stream_info(STREAM)
    if info is None:
        raise LogMismatchError(f"stream {STREAM} was deleted: see docs/operations.md, `A lost stream`")
    return str(info["created"]), max(1, int(info["state"]["first_seq"]))


async def _bucket(api: JetStreamApi) -> dict[str, Any]:
    try:
        return await api.request(f"STREAM.INFO.{BUCKET_STREAM}", {"subjects_filter": key_subject(">")})
    except ApiError as error:
        if error.code != 404:
            raise
        raise PlacementError(
            f"there is no bucket {BUCKET}: `fiq provision` makes it; when it was deleted, `fiq place` then says where "
            "the partitions live"
        ) from error


async def _leaders(api: JetStreamApi, key: str, *, seq: int | None = None) -> _Entry:
    """Return the newest value of *key*, or the first one from revision *seq* on."""
    subject = key_subject(key)
    if seq is None:
        message = await api.last_message(BUCKET_STREAM, subject, timeout=_ANSWER_SECONDS)
    else:
        message = await api.leader_message(BUCKET_STREAM, seq, next_of=subject, timeout=_ANSWER_SECONDS)
    return _ABSENT if message is None else _Entry(message["seq"], _value(message["headers"], message["data"]))


async def _replicas(nc: Connection, keys: list[str], last: int) -> dict[str, _Entry] | None:
    """Return the newest value of each of *keys*; None when not all is as new as the sequence *last*."""
    found: dict[str, _Entry] = {}
    wanted = {"multi_last": [key_subject(key) for key in keys]}
    try:
        async with inbox(nc) as (reply, answers):
            await nc.publish(_DIRECT_GET, orjson.dumps(wanted), reply=reply)
            async with asyncio.timeout(_REPLICA_SECONDS):
                while "Status" not in (headers := (message := await answers.get()).headers or {}):
                    key = headers["Nats-Subject"].removeprefix(f"{BUCKET_PREFIX}.")
                    found[key] = _Entry(int(headers["Nats-Sequence"]), _value(headers, message.data))
    except TimeoutError:
        return None
    except (nats.errors.Error, OSError) as error:
        raise LogUnavailableError(f"bucket {BUCKET}: {type(error).__name__}") from error
    new = headers["Status"] == "204" and int(headers.get("Nats-UpTo-Sequence", 0)) >= last
    return found if new and len(found) == len(keys) else None


def _value(headers: Mapping[str, str] | None, data: bytes) -> dict[str, Any] | None:
    """Return what a key says; None when it was deleted or cannot be read."""
    if _OPERATION in (headers or {}):
        return None
    try:
        found = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None
