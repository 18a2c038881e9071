"""The files that nats.conf includes: accounts and TLS."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from services.cli.security.permissions import PERMISSIONS, Permissions
from services.eventlog.jetstream.names import NODES_HEALTH, NODES_STATE, Role

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
