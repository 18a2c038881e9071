"""The streams: names, definitions, provisioning, and a report of what one holds.

An event is published on ``fi.events.<consultation>``; the server's subject transform stores it under
``fi.events.<partition>.<consultation>``. The names come from the users' own documents and are part of the product.

Provisioning creates the streams, or checks that they are what the settings ask for. It is idempotent, and safe when
several processes do it at the same time while the cluster still elects its leaders: what is transient is tried again
until a deadline, and every round starts from what the broker holds now, because a creation that timed out may have
taken effect.

Limits that are higher in the settings than on the stream are raised. ``max_bytes`` is lowered only where what is stored
leaves a quarter of itself, and at least 8 MiB, free below the new limit: the broker drops the oldest messages of a
stream that is above its new limit (nats-server #2589), and events may arrive between the check and the change.

Whatever else a stream's configuration says is undone: the user that provisions may update streams, so whoever has its
seed can have each event copied elsewhere (``republish``, ``sources``) or deleted (``max_age``), and no permission of
nats-server distinguishes one update from another. :func:`changes` finds it, for the doctor too.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from fiq.words import count
from services.core.logs import get_logger
from services.core.retry import retry
from services.log.errors import LogForbiddenError, LogUnavailableError, ProvisionError
from services.log.jetstream.api import NOT_ENABLED_ERR_CODES, ApiError, JetStreamApi, NoRespondersError
from services.log.jetstream.connection import Connection
from services.log.partitions import partition_name
from services.log.protocol import DEAD_LETTER_LOG, EVENT_LOG, LogIdentity
from services.log.settings import LogSettings
from services.log.status import ReplicaReport, StreamReport

# -- names -------------------------------------------------------------------------------------------------------------

#: the stream of events
STREAM = EVENT_LOG
#: the stream of messages that were set aside
DEAD_STREAM = DEAD_LETTER_LOG

#: the key-value bucket that says which volume has each partition, and the stream that keeps it
BUCKET, BUCKET_STREAM = "fi-partitions", "KV_fi-partitions"
#: prefix of the subjects of its keys
BUCKET_PREFIX = f"$KV.{BUCKET}"

#: prefix of the events' subjects, as published and as stored
EVENTS_PREFIX = "fi.events"
#: what may be published; the token after the prefix is the consultation
EVENTS_SUBJECT = f"{EVENTS_PREFIX}.*"
#: prefix of the dead letters' subjects
DEAD_PREFIX = "fi.dead"
#: subjects of the dead-letter stream
DEAD_SUBJECT = f"{DEAD_PREFIX}.>"

#: prefix of the subjects on which persisters answer questions about the corpus
CORPUS_PREFIX = "fi.corpus"

#: prefix of the subjects on which every node reports what its monitoring port does; `ops` may ask
NODES_PREFIX = "fi.nodes"
#: its state and configuration, and whether it is healthy
NODES_STATE, NODES_HEALTH = f"{NODES_PREFIX}.varz", f"{NODES_PREFIX}.healthz"

#: prefix of the names of the persisters' consumers
WORKERS_PREFIX = "fi-workers"

#: metadata of the streams: version of these definitions
FORMAT_KEY = "fi_format"
#: metadata of the bucket: creation time of the stream of events, when that had events before the bucket was made
LATE_KEY = "fi_made_after_events"
#: metadata of the stream of events: number of partitions, fixed at creation
PARTITIONS_KEY = "fi_partitions"

#: prefix of the metadata from which `nats server check stream` and `consumer` and `nats audit` take their thresholds
MONITOR_PREFIX = "io.nats.monitor."

#: name of the persisters in the NATS service API (ADR-32): what `nats micro ls` and `fiq status` show
PERSISTER_SERVICE = "fi-persister"


_CURSOR_NAME = re.compile(rf"{WORKERS_PREFIX}-([a-z0-9]{{1,32}})-([0-9]{{2}})-([1-9][0-9]{{0,14}})", re.ASCII)


def subject_of(consultation: str) -> str:
    """Return the subject on which an event of *consultation* is published."""
    return f"{EVENTS_PREFIX}.{consultation}"


def filter_subject(partition: int) -> str:
    """Return what the consumer of *partition* filters on: the stored form of its subjects."""
    return f"{EVENTS_PREFIX}.{partition}.*"


def dead_subject(partition: int) -> str:
    """Return the subject on which a message of *partition* is set aside."""
    return f"{DEAD_PREFIX}.{partition}"


def stored_subject(partition: int, consultation: str) -> str:
    """Return the subject under which the stream keeps the events of *consultation*."""
    return f"{EVENTS_PREFIX}.{partition}.{consultation}"


def corpus_subject(store: str, partition: int, kind: str) -> str:
    """Return the subject on which the persister that has *partition* of *store* answers questions of a *kind*."""
    return f"{CORPUS_PREFIX}.{store}.{partition}.{kind}"


def placement_key(store: str, partition: int) -> str:
    """Return the key of the bucket that says which volume has *partition* of *store*."""
    return f"{store}.{partition_name(partition)}"


def key_subject(key: str) -> str:
    """Return the subject under which the bucket keeps *key*."""
    return f"{BUCKET_PREFIX}.{key}"


def stream_of(subject: str) -> str:
    """Return the stream that must acknowledge a message published on *subject*."""
    return DEAD_STREAM if subject.startswith(f"{DEAD_PREFIX}.") else STREAM


def cursor_name(store: str, partition: int, generation: int) -> str:
    """Return the name of a cursor: the consumer through which the owner of *partition* of *store* follows it.

    Each cursor that an owner makes gets a *generation* of its own, so that a predecessor that comes back with its node
    is another consumer.
    """
    return f"{WORKERS_PREFIX}-{store}-{partition_name(partition)}-{generation}"


def parse_cursor_name(name: str) -> tuple[str, int, int] | None:
    """Return store, partition and generation of a cursor, or None for a name of another form."""
    match = _CURSOR_NAME.fullmatch(name)
    return (match[1], int(match[2]), int(match[3])) if match else None


def subject_transform(partitions: int) -> dict[str, str]:
    """Return the transform by which the server files an event under its partition.

    ``partition(n,1)`` hashes the first wildcard's token; :func:`services.log.partitions.partition_of` agrees.
    """
    return {"src": EVENTS_SUBJECT, "dest": f"{EVENTS_PREFIX}.{{{{partition({partitions},1)}}}}.{{{{wildcard(1)}}}}"}


# -- definitions -------------------------------------------------------------------------------------------------------

Config = Mapping[str, Any]

#: room that a lowered ``max_bytes`` must leave above what is stored, bytes
MINIMUM_HEADROOM_BYTES = 8 * 2**20

#: what decides where an event is stored and how long it stays; a service that may not provision stops when it differs
_FIXED = ("subjects", "retention", "storage", "subject_transform")
#: fields that follow the settings, so a difference may come from settings that are not the same everywhere; any other
#: difference was made by hand
SETTINGS_FIELDS = frozenset({"description", "max_bytes", "num_replicas", "duplicate_window", "metadata"})
#: values of fields that the definitions leave out; a field that is missing here must be empty, false or zero
_DEFAULTS = {"max_consumers": -1, "compression": "none", "persist_mode": "default"}
#: version of these definitions, kept in the streams' metadata
FORMAT = 1

#: earlier values that the bucket keeps of each key: `nats kv history fi-partitions` shows them
BUCKET_HISTORY = 8
#: limit of the bucket; a hundred partitions of a store take a quarter of a megabyte, history included
BUCKET_MAX_BYTES = 16 << 20

#: an ack-all consumer counts all after its floor as pending; the follower bounds what it holds, not the broker
MAX_ACK_PENDING = 1_000_000
#: longer than any batch may take, seconds: the broker must never redeliver, as the follower makes a new cursor instead
ACK_WAIT_SECONDS = 600
#: an unused cursor is deleted after this, seconds, if its owner's successor has not deleted it before
CURSOR_IDLE_SECONDS = 24 * 3600

#: `nats server check stream` is critical when a replica is this many raft entries behind, or was last seen so long ago
REPLICA_LAG, REPLICA_SEEN = 1000, "10s"
#: `nats server check consumer` is critical when this many events of a partition wait or are unacknowledged: half of
#: FI_MAX_BACKLOG, and more than FI_BUFFER_EVENTS, both at their defaults
CURSOR_BEHIND = 50_000
#: of messages in the bucket and ids of the dead letters, seconds; what nats-server uses when none is asked for
_BUCKET_WINDOW = 120

_NANOSECONDS = 1_000_000_000


def stream_config(settings: LogSettings) -> dict[str, Any]:
    """Return the configuration of the stream of events."""
    return {
        **_common(settings),
        "name": STREAM,
        "description": (
            f"Events of medical consultations in {settings.partitions} partitions by consultation. "
            "Written by fiq ingest, read by fiq persisters, trimmed by them only. Do not purge or edit by hand."
        ),
        "subjects": [EVENTS_SUBJECT],
        "subject_transform": subject_transform(settings.partitions),
        "max_bytes": settings.max_bytes,
        "duplicate_window": _window(settings),
        "allow_atomic": True,
        "allow_direct": True,
        "metadata": {PARTITIONS_KEY: str(settings.partitions), **_metadata(settings)},
    }


def dead_stream_config(settings: LogSettings) -> dict[str, Any]:
    """Return the configuration of the stream of dead letters.

    A dead letter carries a message id, so that the same one set aside twice within the window is kept once.
    """
    return {
        **_common(settings),
        "name": DEAD_STREAM,
        "description": (
            f"Messages of {STREAM} that no persister could take, each with its reason in the headers. "
            "Read and purge after an operator looked at them."
        ),
        "subjects": [DEAD_SUBJECT],
        "max_bytes": settings.dead_max_bytes,
        "duplicate_window": _window(settings),
        "allow_direct": True,
        # one subject a partition: a warning with the first dead letter, and nothing worse
        "metadata": _metadata(settings, subjects_warn=1, subjects_critical=1000),
    }


def bucket_config(settings: LogSettings) -> dict[str, Any]:
    """Return the configuration of the stream of the bucket ``fi-partitions``, as ``nats kv add`` makes it (ADR-8)."""
    return {
        **_common(settings),
        "name": BUCKET_STREAM,
        "description": "Where the partitions of each store live. Written by fiq persisters, and by fiq for operators.",
        "subjects": [f"{BUCKET_PREFIX}.>"],
        "max_bytes": BUCKET_MAX_BYTES,
        "max_msgs_per_subject": BUCKET_HISTORY,
        "duplicate_window": _BUCKET_WINDOW * _NANOSECONDS,
        "allow_rollup_hdrs": True,
        "deny_delete": True,
        "allow_direct": True,
        "metadata": _metadata(settings),
    }


def cursor_config(store: str, partition: int, generation: int, start: int) -> dict[str, Any]:
    """Return the configuration of a cursor through which *store* follows *partition* from sequence *start* on."""
    name = cursor_name(store, partition, generation)
    return {
        "name": name,
        "durable_name": name,
        "description": (
            f"Cursor of store {store}, partition {partition_name(partition)}: shows how much waits. The persister that "
            "has the partition makes another one when this one is gone."
        ),
        "deliver_policy": "by_start_sequence",
        "opt_start_seq": start,
        "ack_policy": "all",
        "ack_wait": ACK_WAIT_SECONDS * _NANOSECONDS,
        "max_deliver": -1,
        "max_ack_pending": MAX_ACK_PENDING,
        "replay_policy": "instant",
        "filter_subject": filter_subject(partition),
        # the sink holds the position: a replicated cursor would write each delivery through raft for nothing
        "num_replicas": 1,
        "mem_storage": True,
        "inactive_threshold": CURSOR_IDLE_SECONDS * _NANOSECONDS,
        # a persister makes another cursor rather than letting the broker deliver again
        "metadata": _watched(
            outstanding_ack_critical=CURSOR_BEHIND, unprocessed_critical=CURSOR_BEHIND, redelivery_critical=1
        ),
    }


def _common(settings: LogSettings) -> dict[str, Any]:
    return {
        "storage": "file",
        "retention": "limits",
        "discard": "new",
        "num_replicas": settings.replicas,
        "max_age": 0,
        "max_msgs": -1,
        "max_msgs_per_subject": -1,
        "max_msg_size": -1,
    }


def _metadata(settings: LogSettings, **thresholds: object) -> dict[str, str]:
    """Return the metadata of a stream: its format, and thresholds for its replicas besides *thresholds*.

    ``nats server check`` counts replicas only where the metadata says how many there should be; one copy is no cluster.
    """
    replicas: dict[str, object] = {}
    if settings.replicas > 1:
        replicas = {
            "peer_expect": settings.replicas,
            "peer_lag_critical": REPLICA_LAG,
            "peer_seen_critical": REPLICA_SEEN,
        }
    return {FORMAT_KEY: str(FORMAT), **_watched(**replicas, **thresholds)}


def _watched(**thresholds: object) -> dict[str, str]:
    """Return *thresholds* as the NATS command line reads them from metadata."""
    named = {"enabled": "true", **{name.replace("_", "-"): str(value) for name, value in thresholds.items()}}
    return {f"{MONITOR_PREFIX}{name}": value for name, value in named.items()}


def _window(settings: LogSettings) -> int:
    """Return the duplicate window in nanoseconds, as the broker counts it."""
    return round(settings.duplicate_window * _NANOSECONDS)


def changes(wanted: Config, current: Config, stored_bytes: int) -> dict[str, Any]:
    """Return the fields of *current*, a stream's configuration, that must become those of *wanted*.

    Includes fields that *wanted* does not have: nobody asked for them, so they must go (None).

    Args:
        wanted: what the definitions say.
        current: what the broker says.
        stored_bytes: what the stream holds.

    Raises ProvisionError: the stream is not ours, or a change would lose events or safety.
    """
    check_ownership(wanted, current)
    _check_limits(wanted, current, stored_bytes)
    different = {key: value for key, value in wanted.items() if key != "metadata" and current.get(key) != value}
    different |= {key: None for key in current.keys() - wanted.keys() if not _is_default(key, current[key])}
    metadata = _merged_metadata(wanted, current)
    if metadata != own_metadata(current):
        different["metadata"] = metadata
    return different


def _is_default(field: str, value: Any) -> bool:
    return not value or value == _DEFAULTS.get(field)


def _merged_metadata(wanted: Config, current: Config) -> dict[str, str]:
    """Return *wanted*'s metadata with the notes that others left in it."""
    return {**own_metadata(current), **wanted["metadata"]}


def check_ownership(wanted: Config, current: Config) -> None:
    """Check that *current* is a stream of ours with the wanted partitions.

    Raises ProvisionError: it is another one; the message says what to do.
    """
    name, metadata = wanted["name"], current.get("metadata") or {}
    if FORMAT_KEY not in metadata:
        raise ProvisionError(
            f"stream {name} exists but was not made by fiq (no {FORMAT_KEY} in its metadata): "
            "use another NATS account, or move that stream away"
        )
    if metadata[FORMAT_KEY] != str(FORMAT):
        raise ProvisionError(
            f"stream {name} has format {metadata[FORMAT_KEY]}, this fiq knows {FORMAT}: run the matching version"
        )
    have, want = metadata.get(PARTITIONS_KEY), wanted["metadata"].get(PARTITIONS_KEY)
    if have != want:
        raise ProvisionError(
            f"stream {name} was made with FI_PARTITIONS={have}, and it is {want} here: the number is fixed when "
            f"the stream is created, because it decides where a consultation lives. Set FI_PARTITIONS={have}"
        )


def _check_storing(wanted: Config, current: Config) -> None:
    """Check what decides where an event is stored. Raises ProvisionError: it was changed by hand."""
    for key in _FIXED:
        if current.get(key) != wanted.get(key):
            raise ProvisionError(
                f"stream {wanted['name']} was changed by hand: {key} is {current.get(key)!r}, fiq needs "
                f"{wanted.get(key)!r}: run `fiq provision`"
            )


def _check_limits(wanted: Config, current: Config, stored_bytes: int) -> None:
    name, have, want = wanted["name"], current["num_replicas"], wanted["num_replicas"]
    if want < have:
        raise ProvisionError(
            f"stream {name} has {count(have, 'replica')}, FI_REPLICAS is {want}: fewer copies would make stored "
            f"events less safe. Set FI_REPLICAS={have}, or lower it by hand with `nats stream edit`"
        )
    limit = wanted["max_bytes"]
    needed = stored_bytes + max(stored_bytes // 4, MINIMUM_HEADROOM_BYTES)
    if current["max_bytes"] > limit and needed > limit:
        raise ProvisionError(
            f"stream {name} holds {stored_bytes} bytes of {current['max_bytes']}: lowering its limit to {limit} could "
            f"drop events. Set {size_setting(name)} to {needed} or more, or wait until the stream is trimmed"
        )


def own_metadata(config: Config) -> dict[str, str]:
    """Return the metadata without what the server adds by itself."""
    return {key: value for key, value in (config.get("metadata") or {}).items() if not key.startswith("_nats.")}


def size_setting(stream: str) -> str:
    """Return the name of the setting that limits *stream*; for the small bucket that of what takes its room."""
    return "FI_DEAD_MAX_BYTES" if stream == DEAD_STREAM else "FI_STREAM_MAX_BYTES"


# -- what a stream holds -----------------------------------------------------------------------------------------------


def read_stream(info: Mapping[str, Any]) -> StreamReport:
    """Build the report from an answer to STREAM.INFO."""
    config, state, cluster = info["config"], info["state"], info.get("cluster")
    partitions = (config.get("metadata") or {}).get(PARTITIONS_KEY, "")
    return StreamReport(
        created=info["created"],
        partitions=int(partitions) if partitions.isdigit() else 0,
        leader=cluster.get("leader", "") if cluster is not None else "(single server)",
        replicas=tuple(_replica(peer) for peer in (cluster or {}).get("replicas") or ()),
        messages=state["messages"],
        bytes=state["bytes"],
        max_bytes=config["max_bytes"],
        first_sequence=state["first_seq"],
        last_sequence=state["last_seq"],
    )


def _replica(peer: Mapping[str, Any]) -> ReplicaReport:
    active = peer.get("active", 0)
    return ReplicaReport(
        name=peer["name"],
        current=bool(peer.get("current", False)),
        offline=bool(peer.get("offline", False)),
        lag=peer.get("lag", 0),
        seen_seconds=active / 1e9 if active else None,
    )


T = TypeVar("T")

#: oldest server that this was tested with
MINIMUM_VERSION = (2, 14)
#: elections right after a cluster's start may take this long, seconds
DEADLINE_SECONDS = 30.0
#: one answer of the broker may take this long, seconds; some never come although the request took effect
ANSWER_SECONDS = 2.0
#: nodes that have just started are not offered for placement yet; after this a refusal is believed, seconds
GRACE_SECONDS = 6.0
_RETRY_SECONDS = 0.25

_NO_PEERS = 10005
_NO_STORAGE = 10047
_EXISTS_DIFFERENTLY = 10058
_OVERLAP = 10065
_NOT_CLUSTERED = 10074
#: errors of placement, which a cluster also answers while its nodes come up
_NO_PLACE = frozenset({_NO_PEERS, _NO_STORAGE})

_log = get_logger("eventlog.provision")


async def provision(nc: Connection, settings: LogSettings, *, deadline: float = DEADLINE_SECONDS) -> LogIdentity:
    """Make both streams what *settings* ask for, and return which log this is.

    Args:
        nc: a connection whose user may create and update streams.
        settings: the wanted state.
        deadline: seconds for everything.

    Raises ProvisionError: the server or an existing stream prevents it; the message says what to do;
    LogUnavailableError: the cluster was not ready within *deadline*; call again.
    """
    check_version(str(nc.server_info.get("version", "")))
    api = JetStreamApi(nc, timeout=min(ANSWER_SECONDS, deadline))
    retries = _Retries(deadline)
    try:
        await retries.retry(lambda: _enabled(nc, api.request("INFO")))
        info = await retries.retry(lambda: _ensure(api, stream_config(settings), retries))
        await retries.retry(lambda: _ensure(api, dead_stream_config(settings), retries))
        # which stores had keys in an earlier bucket is then not known: nothing is trimmed until an operator names them
        late = {LATE_KEY: info["created"]} if info["state"]["last_seq"] else {}
        await retries.retry(lambda: _ensure(api, bucket_config(settings), retries, at_creation=late))
    except LogForbiddenError as error:
        raise ProvisionError(
            f"the NATS user may not provision ({error}): run `fiq provision` as one who may, and set "
            "FI_PROVISION=false here"
        ) from error
    return _identity(info)


async def stream_identity(nc: Connection, settings: LogSettings, *, deadline: float = DEADLINE_SECONDS) -> LogIdentity:
    """Check that the stream exists and is what *settings* ask for, change nothing, and return which log it is.

    Raises ProvisionError: there is no JetStream, no such stream, or it is another one; LogUnavailableError: no answer
    within *deadline* seconds; call again.
    """
    check_version(str(nc.server_info.get("version", "")))
    api = JetStreamApi(nc, timeout=min(ANSWER_SECONDS, deadline))
    # not INFO of the account: a persister that does not provision may have no right to ask for it
    info = await _Retries(deadline).retry(lambda: _enabled(nc, api.stream_info(STREAM)))
    if info is None:
        raise ProvisionError(f"stream {STREAM} does not exist: run `fiq provision`, or set FI_PROVISION=true")
    wanted = stream_config(settings)
    check_ownership(wanted, info["config"])
    _check_storing(wanted, info["config"])
    return _identity(info)


def check_version(version: str) -> None:
    """Check that the server is new enough. Raises ProvisionError: it is older than 2.14, or says no version."""
    match = re.match(r"v?(\d+)\.(\d+)", version)
    if match is None or (int(match[1]), int(match[2])) < MINIMUM_VERSION:
        wanted = ".".join(str(part) for part in MINIMUM_VERSION)
        raise ProvisionError(
            f"nats-server is {version or 'of unknown version'}, fiq needs {wanted} or newer (consumer reset): "
            "upgrade every node of the cluster"
        )


def _identity(info: Mapping[str, Any]) -> LogIdentity:
    return LogIdentity(STREAM, info["created"])


async def _enabled(nc: Connection, request: Awaitable[T]) -> T:
    """Return the answer to *request*; raise ProvisionError when JetStream is off and none can come."""
    try:
        return await request
    except NoRespondersError:
        if not nc.server_info.get("jetstream"):
            raise _not_enabled() from None
        raise
    except ApiError as error:
        if error.err_code in NOT_ENABLED_ERR_CODES:
            raise _not_enabled() from None
        raise


def _not_enabled() -> ProvisionError:
    return ProvisionError(
        "JetStream is not enabled on the server, or not for this account: add `jetstream { ... }` to nats.conf, or "
        "point FI_LOG_URL to the cluster of deploy/nats-cluster"
    )


async def _ensure(
    api: JetStreamApi, wanted: Config, retries: _Retries, *, at_creation: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Bring one stream to *wanted* and return its info; one round, to be repeated when it says "unavailable"."""
    info = await api.stream_info(wanted["name"])
    if info is None:
        metadata = {**wanted["metadata"], **(at_creation or {})}
        return await _change(api, "CREATE", {**wanted, "metadata": metadata}, retries)
    check_version(_own_version(info["config"]))
    different = changes(wanted, info["config"], info["state"]["bytes"])
    if not different:
        return info
    before = {key: info["config"].get(key) for key in different}
    # nothing but what is wanted: the server takes its defaults for the rest
    info = await _change(api, "UPDATE", {**wanted, "metadata": _merged_metadata(wanted, info["config"])}, retries)
    _log.warning("LOG_STREAM_CHANGED", stream=wanted["name"], before=before, after=different)
    return info


def _own_version(config: Config) -> str:
    """Return the version of the server that leads the stream, which may be another than the connected one."""
    return str((config.get("metadata") or {}).get("_nats.ver", ".".join(map(str, MINIMUM_VERSION))))


async def _change(api: JetStreamApi, verb: str, config: Config, retries: _Retries) -> dict[str, Any]:
    try:
        return await api.request(f"STREAM.{verb}.{config['name']}", config)
    except ApiError as error:
        if isinstance(error, LogUnavailableError):
            raise
        if error.err_code == _EXISTS_DIFFERENTLY or (error.err_code in _NO_PLACE and retries.elapsed < GRACE_SECONDS):
            # another process created it after our look, or the nodes have only just come up: look again
            raise LogUnavailableError(str(error)) from error
        raise ProvisionError(_refusal(error, verb, config)) from error


def _refusal(error: ApiError, verb: str, config: Config) -> str:
    name, replicas = config["name"], config["num_replicas"]
    if error.err_code == _NO_STORAGE or "insufficient storage" in error.description:
        return (
            f"stream {name} needs {config['max_bytes']} bytes on {count(replicas, 'node')} without that much left "
            f"({error.description}): raise max_file_store in nats.conf or lower {size_setting(name)}"
        )
    if error.err_code in {_NO_PEERS, _NOT_CLUSTERED}:
        return (
            f"stream {name} needs {count(replicas, 'node')}, the cluster offers fewer ({error.description}): start "
            f"{replicas} nodes of one cluster, or set FI_REPLICAS=1 for an experiment"
        )
    if error.err_code == _OVERLAP:
        return (
            f"another stream takes subjects of {name} already ({error.description}): `nats stream ls` shows it; remove "
            "its subjects under fi.events and fi.dead, or use another NATS account"
        )
    if verb == "UPDATE":
        return f"stream {name} was changed by hand in a way that nats-server does not undo ({error}): move it away"
    return f"stream {name} is refused: {error}"


class _Retries:
    """Repeats what is unavailable until a deadline."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._start = self._loop.time()

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return self._loop.time() - self._start

    async def retry(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Return what *operation* returns, the first time that it is not unavailable."""
        return await retry(operation, on=LogUnavailableError, pause=_RETRY_SECONDS, failed=self._check)

    def _check(self, error: Exception) -> None:
        if self.elapsed + _RETRY_SECONDS > self._seconds:
            raise LogUnavailableError(
                f"the cluster did not get ready within {self._seconds:g} s: {error}. "
                "Check that a majority of its nodes runs"
            ) from error
