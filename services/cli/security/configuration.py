"""The files that nats.conf includes: accounts and TLS."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
#: the account of the streams
ACCOUNT = "FI"
#: the user of the system account: `nats server report`, and nothing that a service needs
SYSTEM = "system"
#: what the system account lets the streams' account ask all nodes, and on which subject: no more than the monitoring
#: port tells at /varz and /healthz
_QUESTIONS = {"VARZ": NODES_STATE, "HEALTHZ": NODES_HEALTH}
#: everybody who has a seed
USERS = (*Role, SYSTEM)

_HEADER = "# Written by `fiq init`, which will write it again: a change made here is lost. See docs/security.md.\n"

#: an answer to a request of the service API: one, and soon
_ANSWERS = '{ max: 1, expires: "10s" }'

_TLS = """tls {{
  cert_file: $NODE_CERT
  key_file: $NODE_KEY
  ca_file: $NODE_CA
  min_version: "1.3"
  timeout: 3
  {last}
}}
"""


def accounts(keys: Mapping[str, Sequence[str]]) -> str:
    """Return accounts.conf.

    Args:
        keys: user -> its public nkeys: one, or two during a rotation.
    """
    users = [_user(role, key, PERMISSIONS[role]) for role in Role for key in keys[role]]
    system = [f"    {{ nkey: {key} }}  # {SYSTEM}\n" for key in keys[SYSTEM]]
    questions = {f"$SYS.REQ.SERVER.PING.{kind}": subject for kind, subject in _QUESTIONS.items()}
    imports = [
        f'    {{ service: {{ account: SYS, subject: "{asked}" }}, to: "{subject}" }}\n'
        for asked, subject in questions.items()
    ]
    exports = [f'    {{ service: "{asked}", accounts: [{ACCOUNT}], response_type: Stream }}\n' for asked in questions]
    return (
        f"{_HEADER}\naccounts {{\n"
        f"  {ACCOUNT}: {{ jetstream: enabled, imports: [\n{''.join(imports)}  ], users: [\n{''.join(users)}  ] }}\n"
        f"  SYS: {{ exports: [\n{''.join(exports)}  ], users: [\n{''.join(system)}  ] }}\n"
        f"}}\nsystem_account: SYS\n"
    )


def client_tls() -> str:
    """Return client-tls.conf: nothing before the handshake, not even the server's INFO."""
    return f"{_HEADER}\n{_TLS.format(last='handshake_first: true')}"


def route_tls() -> str:
    """Return route-tls.conf: both sides show a certificate of the deployment's authority."""
    return f"{_HEADER}\n{_TLS.format(last='verify: true')}"


def at_rest(key: str) -> str:
    """Return at-rest.conf: AES-GCM with a key derived from *key*; an empty one leaves the disk readable."""
    if not key:
        return f"{_HEADER}# No encryption on the disk: the deployment was made without --encrypt.\n"
    return f"{_HEADER}\nkey: {json.dumps(key)}\ncipher: aes\n"


def _user(role: Role, key: str, may: Permissions) -> str:
    lines = [
        f"    # {role}",
        f"    {{ nkey: {key}, permissions: {{",
        f"      publish: {{ allow: {_subjects(may.publish)} }}",
        f"      subscribe: {{ allow: {_subjects(may.subscribe)} }}",
        *([f"      allow_responses: {_ANSWERS}"] if may.answers else []),
        "    } }",
    ]
    return "\n".join(lines) + "\n"


def _subjects(subjects: Sequence[str]) -> str:
    if not subjects:  # to nats-server an empty list means everything
        raise ValueError("a user needs at least one subject")
    inner = ",\n".join(f"        {json.dumps(subject)}" for subject in subjects)
    return f"[\n{inner}\n      ]"


# -- What each NATS user may do: the subjects that its role sends and hears, found by watching it work, and no others
#
# Whoever may ask for a message (``STREAM.MSG.GET``, ``DIRECT.GET``), create a consumer or take a snapshot reads events,
# which are medical data: the services and ``ops`` may, the provisioner not.


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
    *_api(*_each("STREAM.INFO.{}"), f"CONSUMER.LIST.{STREAM}", f"DIRECT.GET.{STREAM}"),
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
                f"CONSUMER.INFO.{STREAM}.*",
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
