"""What each NATS user may do: the subjects that its role sends and hears, found by watching it work, and no others.

Whoever may ask for a message (``STREAM.MSG.GET``, ``DIRECT.GET``), create a consumer or take a snapshot reads events,
which are medical data: the services and ``ops`` may, the provisioner not.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.eventlog.jetstream.names import (
    BUCKET_PREFIX,
    BUCKET_STREAM,
    CORPUS_PREFIX,
    DEAD_PREFIX,
    DEAD_STREAM,
    EVENTS_PREFIX,
    EVENTS_SUBJECT,
    NODES_HEALTH,
    NODES_STATE,
    PERSISTER_SERVICE,
    STREAM,
    Role,
    inbox_prefix,
)
from services.eventlog.jetstream.questions import Kind

_STREAMS = (STREAM, DEAD_STREAM)
#: subjects of the keys that say where partitions live
_KEYS = f"{BUCKET_PREFIX}.>"


@dataclass(frozen=True, slots=True)
class Permissions:
    """Subjects that a user may publish on and subscribe to; *answers*: to a request also on the subject it names."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    answers: bool = False


def _api(*suffixes: str) -> tuple[str, ...]:
    return tuple(f"$JS.API.{suffix}" for suffix in suffixes)


def _each(pattern: str) -> tuple[str, ...]:
    return tuple(pattern.format(stream) for stream in _STREAMS)


def _inbox(role: Role) -> str:
    return f"{inbox_prefix(role)}.>"


#: what both services ask to show the log in their metrics: state, backlog, age of what waits, places, living persisters
_WATCH = (
    *_api(*_each("STREAM.INFO.{}"), f"DIRECT.GET.{STREAM}"),
    *_api(*(f"{verb}.{BUCKET_STREAM}" for verb in ("STREAM.INFO", "STREAM.MSG.GET", "DIRECT.GET"))),
    f"$SRV.INFO.{PERSISTER_SERVICE}",
)

PERMISSIONS: dict[Role, Permissions] = {
    Role.INGEST: Permissions(
        publish=(
            EVENTS_SUBJECT,
            *_WATCH,
            # what a client was told is stored must be shown to it: only the stream's leader is sure to have it
            *_api(f"STREAM.MSG.GET.{STREAM}"),
            *(f"{CORPUS_PREFIX}.*.*.{kind}" for kind in Kind),
        ),
        subscribe=(_inbox(Role.INGEST),),
    ),
    Role.PERSISTER: Permissions(
        publish=(
            *_WATCH,
            *_api(
                f"STREAM.MSG.GET.{STREAM}",
                f"STREAM.PURGE.{STREAM}",
                # <consumer>.fi.events.<partition>.*: the filter stands in the subject, its asterisk as itself
                f"CONSUMER.CREATE.{STREAM}.*.{EVENTS_PREFIX}.*.*",
                f"CONSUMER.DELETE.{STREAM}.*",
                f"CONSUMER.NAMES.{STREAM}",
                f"CONSUMER.MSG.NEXT.{STREAM}.*",
            ),
            _KEYS,
            f"$JS.ACK.{STREAM}.>",
            f"$JS.ACK.*.*.{STREAM}.>",  # the form with domain and account: feature_flags { js_ack_fc_v2: true }
            f"{DEAD_PREFIX}.*",
        ),
        subscribe=(
            _inbox(Role.PERSISTER),
            f"{CORPUS_PREFIX}.*.*.*",
            _KEYS,  # a put is a publish: who hears it reads the bucket again
            *(
                subject
                for verb in ("PING", "INFO", "STATS")
                for subject in (
                    f"$SRV.{verb}",
                    f"$SRV.{verb}.{PERSISTER_SERVICE}",
                    f"$SRV.{verb}.{PERSISTER_SERVICE}.*",
                )
            ),
        ),
        answers=True,
    ),
    Role.PROVISIONER: Permissions(
        publish=_api(
            "INFO",
            *(f"STREAM.{verb}.{name}" for verb in ("INFO", "CREATE", "UPDATE") for name in (*_STREAMS, BUCKET_STREAM)),
        ),
        subscribe=(_inbox(Role.PROVISIONER),),
    ),
    Role.OPS: Permissions(
        publish=(
            *_api(
                "INFO",
                "STREAM.NAMES",
                "STREAM.LIST",
                "STREAM.INFO.*",
                "CONSUMER.NAMES.*",
                "CONSUMER.LIST.*",
                "CONSUMER.INFO.*.*",
                # `nats stream get`
                *_each("STREAM.MSG.GET.{}"),
                *_each("DIRECT.GET.{}"),
                *_each("DIRECT.GET.{}.>"),
                # `nats stream backup`
                *_each("STREAM.SNAPSHOT.{}"),
                # `nats kv get`, `ls`, `history` and `watch`: the last three make a consumer of their own
                f"STREAM.MSG.GET.{BUCKET_STREAM}",
                f"DIRECT.GET.{BUCKET_STREAM}",
                f"DIRECT.GET.{BUCKET_STREAM}.>",
                f"CONSUMER.CREATE.{BUCKET_STREAM}",
                f"CONSUMER.CREATE.{BUCKET_STREAM}.>",
                f"CONSUMER.DELETE.{BUCKET_STREAM}.*",
                # `nats stream view` makes a consumer and deletes it: of fi-events that could be a persister's
                f"CONSUMER.CREATE.{DEAD_STREAM}.>",
                f"CONSUMER.DURABLE.CREATE.{DEAD_STREAM}.*",
                f"CONSUMER.MSG.NEXT.{DEAD_STREAM}.*",
                f"CONSUMER.DELETE.{DEAD_STREAM}.*",
            ),
            f"$JS.FC.{BUCKET_STREAM}.>",
            # `fiq restore`, `fiq give-up` and `fiq place`
            _KEYS,
            f"$JS.ACK.{DEAD_STREAM}.>",
            *_each("$JS.SNAPSHOT.ACK.{}.>"),
            *(f"$SRV.{verb}{tail}" for verb in ("PING", "INFO", "STATS") for tail in ("", ".>")),
            # `fiq doctor`: every node, wherever its monitoring port is
            NODES_STATE,
            NODES_HEALTH,
        ),
        subscribe=(_inbox(Role.OPS),),
    ),
}
