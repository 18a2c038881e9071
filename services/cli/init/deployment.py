"""``fiq init``: makes the secrets of a deployment, completes them, and renews them.

A second run changes nothing. Derived files (those for nats-server) are written from what they derive from (seeds,
certificates), so the next run finishes one that was interrupted. The authority is made once and never replaced,
because every process trusts it. The permissions of the NATS users are at the end of this module.
"""

from __future__ import annotations

import json
import os
import secrets as random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import nkeys
import typer

from fiq.words import count
from services.cli.errors import CommandError, UsageError
from services.cli.init.files import (
    CONTAINER_USERS,
    IMAGE_USER,
    PUBLIC_MODE,
    ContainerRole,
    FileOwner,
    Layout,
    Secrets,
    container_users,
)
from services.cli.init.keys import (
    Authority,
    Pair,
    belong_together,
    check_host,
    make_authority,
    make_curve_keys,
    names_in,
    start_of,
)
from services.core import tokens
from services.core.tokens import Scope, Token
from services.log.jetstream.connection import Role, inbox_prefix, public_key
from services.log.jetstream.stream import (
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
)
from services.log.questions import Kind

#: nodes of a deployment on one machine
NODES = 3
#: the account of the streams
ACCOUNT = "FI"
#: the user of the system account, for `nats server report`; no service needs it
SYSTEM = "system"
#: all users with a seed
USERS = (*Role, SYSTEM)
#: names of every node on its own machine
_LOCAL = ("localhost", "127.0.0.1")
_AUTHORITY = "Free Intelligence event log"
#: name of the first API token
_TOKEN = "default"  # noqa: S105 - its name
_AT_REST_BYTES = 32
_PASSWORD_BYTES = 18
_RESTORE_AUTHORITY = "restore the authority from your copy; no process would trust a new one, so fiq makes none"
_RENEW = "renew all with  --rotate certificates"
_ONE_USER = (
    "note: all containers run as {user}, so a break-out from one reaches the secrets and data of all; run by root, "
    "fiq init gives each role a user of its own: docs/security.md"
)


class Rotation(StrEnum):
    """What can be renewed."""

    CERTIFICATES = "certificates"
    USERS = "users"
    USERS_FINISH = "users-finish"


#: what to do after each
_NEXT = {
    Rotation.CERTIFICATES: "copy secrets/nodes to every host, into the same files "
    "(rsync -a --inplace --numeric-ids), then reload each node: check with `nats-server -t`, then SIGHUP",
    Rotation.USERS: "copy secrets/nats to every host (rsync -a --numeric-ids) and reload each node, check with "
    "`nats-server -t`, then SIGHUP; both seeds are good then, and  fiq init {folder} --rotate users-finish  is the "
    "second step",
    Rotation.USERS_FINISH: "copy secrets/users and secrets/nats to every host, into the same files "
    "(rsync -a --inplace --numeric-ids), then reload each node: the services connect with their new seeds by "
    "themselves",
}


def init(
    folder: Annotated[Path, typer.Argument(help="Folder of the deployment; made if it is missing.")],
    hosts: Annotated[
        str,
        typer.Option(
            help="Names or addresses of the machines, one node each, separated by commas; n1 is on the first."
        ),
    ] = "",
    owner: Annotated[
        str,
        typer.Option(
            metavar="UID[:GID]",
            help="One user for all containers and their secrets, at the first run. By default yourself, or for root a "
            "user for each role; later what .env says.",
        ),
    ] = "",
    encrypt: Annotated[
        bool, typer.Option("--encrypt", help="Let the nodes encrypt what they store; only at the first run.")
    ] = False,
    rotate: Annotated[
        Rotation | None,
        typer.Option(help="Renew the nodes' certificates; or the users' seeds, in two steps: users, users-finish."),
    ] = None,
    curve: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Only make CURVE keys, for a log without a broker: the persisters' pair, and one for each of these "
            "clients, such as ingest-1,ingest-2.",
        ),
    ] = "",
) -> None:
    """Create the secrets of a deployment.

    Creates what is missing: authority, certificates, users, an API token, a password. A second run changes nothing.
    Renewing needs no downtime: docs/security.md has the steps.
    """
    if rotate is not None and encrypt:
        raise UsageError("--encrypt cannot be combined with --rotate: it applies to the first run only")
    if curve:
        names = [name.strip() for name in curve.split(",") if name.strip()]
        _print_changes(folder, make_curve_keys(folder, _curve_owner(_parse_owner(owner), Layout(folder)), names))
        return
    names = _hosts(hosts)
    deployment = Deployment(folder, _parse_owner(owner))
    new = not deployment.layout.environment.exists()
    if rotate is Rotation.CERTIFICATES:
        deployment.renew_certificates(names)
    elif rotate is Rotation.USERS:
        deployment.begin_users()
    elif rotate is Rotation.USERS_FINISH:
        deployment.finish_users()
    else:
        deployment.complete(names, encrypt=encrypt)
    _print_changes(folder, deployment.changes)
    if new and not owner and len(set(deployment.users.values())) == 1:
        typer.echo(_ONE_USER.format(user=deployment.users[ContainerRole.INGEST]))
    if rotate is not None:
        typer.echo(f"next: {_NEXT[rotate].format(folder=folder)}")


def _print_changes(folder: Path, changes: Sequence[str]) -> None:
    for change in changes:
        typer.echo(change)
    if not changes:
        typer.echo(f"{folder}: nothing is missing, nothing was changed")


def _hosts(value: str) -> list[str]:
    try:
        hosts = [check_host(part.strip()) for part in value.split(",") if part.strip()]
    except ValueError as error:
        raise UsageError(f"--hosts: {error}") from None
    if len(set(hosts)) < len(hosts):
        raise UsageError("--hosts: each host has one node; name it once")
    if len(hosts) == 2 or len(hosts) > 99:
        raise UsageError(f"--hosts: {count(len(hosts), 'node')} cannot be a cluster; name three or five hosts")
    return hosts


def _parse_owner(value: str) -> FileOwner | None:
    try:
        return FileOwner.parse(value) if value else None
    except ValueError as error:
        raise UsageError(f"--owner {value}: {error}") from None


def _curve_owner(owner: FileOwner | None, layout: Layout) -> FileOwner:
    """Return *owner*, or the present one: processes run as that user, and could not read another one's keys."""
    if owner is None and layout.secrets.exists():
        return FileOwner.of(layout.secrets.lstat())
    return owner or (IMAGE_USER if os.geteuid() == 0 else FileOwner.myself())


def _users(layout: Layout, owner: FileOwner | None) -> dict[ContainerRole, FileOwner]:
    """Return the user of each role: what .env says, or *owner*, or the default of a new deployment."""
    users = container_users(layout)
    if users is None:
        mine = owner or _only_user(layout) or (None if os.geteuid() == 0 else FileOwner.myself())
        return dict(CONTAINER_USERS) if mine is None else dict.fromkeys(ContainerRole, mine)
    for role, user in users.items():
        if owner not in {None, user}:
            raise CommandError(
                f"{layout.environment} has {role.variable}={user}: change it there, and leave --owner out"
            )
    return users


def _only_user(layout: Layout) -> FileOwner | None:
    """Return the only user of a deployment that has lost its .env; None if it has several, or is new."""
    try:
        nodes, ingest = (FileOwner.of(folder.lstat()) for folder in (layout.nats, layout.api))
    except OSError:  # nothing exists yet; or another user's, which is refused later
        return None
    return nodes if nodes == ingest else None


# -- The deployment --------------------------------------------------------------------------------------------------


class Deployment:
    """A folder with the secrets of one deployment.

    Args:
        folder: made if it is missing.
        owner: the only user of all containers; by default what .env says, and for a new deployment this user, or for
            root one for each role.

    Raises CommandError: .env has no such users, or others than *owner*.

    Attributes:
        users: of the containers, by their role.
    """

    def __init__(self, folder: Path, owner: FileOwner | None = None) -> None:
        self.layout = Layout(folder.absolute())
        self.users = _users(self.layout, owner)
        operator = self._operator()
        self._secrets = Secrets(self.layout.folder, lambda path: self._owner_of(path, operator))

    @property
    def changes(self) -> list[str]:
        """What has been done, one line each."""
        return self._secrets.changes

    def complete(self, hosts: Sequence[str] = (), *, encrypt: bool = False) -> None:
        """Create everything that is missing.

        Args:
            hosts: machine of each node, in order; without them three nodes, or the existing ones.
            encrypt: let the nodes encrypt what they store.

        Raises CommandError: an existing file does not fit; it was not changed.
        """
        with self._at_work():
            authority = self._authority()
            nodes = self._nodes(hosts)
            for node, names in nodes.items():
                self._ensure_node(authority, node, names, asked=bool(hosts))
            for user in USERS:
                self._ensure_seed(user)
            self._write_nats(encrypt=encrypt)
            self._ensure_token()
            self._ensure_password()
            self._ensure_environment(dict(zip(nodes, hosts, strict=True)) if hosts else {})

    def renew_certificates(self, hosts: Sequence[str] = ()) -> None:
        """Give every node a new key and certificate, for *hosts* or the names in the old one."""
        self._must_exist()
        with self._at_work():
            authority = self._authority(may_make=False)
            known = self.layout.known_nodes()
            if hosts and len(hosts) < len(known):
                raise CommandError(
                    f"the deployment has {count(len(known), 'node')} ({', '.join(known)}): name as many --hosts"
                )
            for node, names in self._nodes(hosts).items():
                path = self.layout.node_certificate(node)
                wanted = names if hosts or not path.exists() else self._names(node)
                self._write_node(node, authority.sign(node, wanted, start=start_of(datetime.now(UTC))))

    def begin_users(self) -> None:
        """Create the users' next seeds, and let the nodes accept both: step 1 of 2."""
        self._must_exist()
        with self._at_work():
            self._check_users()
            for user in USERS:
                if not self.layout.next_seed(user).exists():
                    self._secrets.create(self.layout.next_seed(user), new_seed())
            self._write_nats()

    def finish_users(self) -> None:
        """Replace the seeds by the next ones, and let the nodes accept only these: step 2 of 2.

        Raises CommandError: no rotation has been begun.
        """
        self._must_exist()
        with self._at_work():
            self._check_users()
            accounts = self.layout.nats / "accounts.conf"
            # the last step of an interrupted run may be missing
            complete = accounts.exists() and accounts.read_bytes() == self._accounts()
            if complete and not any(self.layout.next_seed(user).exists() for user in USERS):
                raise CommandError("no rotation of users has been begun: begin one with  --rotate users")
            for user in USERS:
                following = self.layout.next_seed(user)
                if following.exists():
                    self._secrets.put(self.layout.seed(user), following.read_bytes())
                    self._secrets.remove(following)
            self._write_nats()

    # -- parts --------------------------------------------------------------------------------------------------------

    def _must_exist(self) -> None:
        if not self.layout.secrets.is_dir():
            raise CommandError(f"{self.layout.secrets} does not exist: make it with  fiq init {self.layout.folder}")

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        layout = self.layout
        if not layout.folder.exists():
            self._secrets.folder(layout.folder)
        for folder in (layout.secrets, *layout.folders):
            self._secrets.folder(folder)
        with self._secrets.alone(layout.secrets):
            self._secrets.put(layout.ignore, b"*\n")
            yield

    def _authority(self, *, may_make: bool = True) -> Authority:
        certificate, key = self.layout.ca_certificate, self.layout.ca_key
        if may_make and not certificate.exists() and not key.exists():
            if self.layout.known_nodes():
                raise CommandError(
                    f"{certificate} and {key} are gone, but there are certificates of nodes: {_RESTORE_AUTHORITY}"
                )
            pair = make_authority(_AUTHORITY, now=datetime.now(UTC))
            self._secrets.create(key, pair.key)
            self._secrets.create(certificate, pair.certificate, mode=PUBLIC_MODE)
        for path in (certificate, key):
            if not path.exists():
                raise CommandError(f"{path} is gone: {_RESTORE_AUTHORITY}")
        self._secrets.mend(certificate, mode=PUBLIC_MODE)
        self._secrets.mend(key)
        try:
            return Authority(Pair(certificate.read_bytes(), key.read_bytes()))
        except (ValueError, TypeError):
            raise CommandError(
                f"{certificate} and {key} are no certificate and its key in PEM form: {_RESTORE_AUTHORITY}"
            ) from None

    def _operator(self) -> FileOwner:
        """Return the owner of what no container needs: this user, or for root, the owner of the deployment's folder."""
        made = self.layout.folder
        return FileOwner.of(made.stat()) if os.geteuid() == 0 and made.exists() else FileOwner.myself()

    def _owner_of(self, path: Path, operator: FileOwner) -> FileOwner:
        role = self.layout.container_of(path)
        return operator if role is None else self.users[role]

    def _nodes(self, hosts: Sequence[str]) -> dict[str, list[str]]:
        """Return the nodes, and for each the names besides its own that its certificate must have."""
        known = self.layout.known_nodes()
        names = (
            [f"n{number + 1}" for number in range(len(hosts))]
            if hosts
            else known or [f"n{i + 1}" for i in range(NODES)]
        )
        surplus = [node for node in known if node not in names]
        if surplus:
            raise CommandError(f"there are nodes without a host: {', '.join(surplus)}; name all --hosts, in order")
        return {node: [*_LOCAL, *hosts[index : index + 1]] for index, node in enumerate(names)}

    def _names(self, node: str) -> list[str]:
        try:
            return [name for name in names_in(self.layout.node_certificate(node).read_bytes()) if name != node]
        except ValueError:
            raise CommandError(
                f"{self.layout.node_certificate(node)} cannot be read: renew it with  --rotate certificates --hosts …"
            ) from None

    def _ensure_node(self, authority: Authority, node: str, names: Sequence[str], *, asked: bool) -> None:
        certificate, key = self.layout.node_certificate(node), self.layout.node_key(node)
        if not certificate.exists() and not key.exists():
            self._write_node(node, authority.sign(node, names, start=start_of(datetime.now(UTC))))
            return
        if not key.exists() or not certificate.exists():
            raise CommandError(f"{key} or {certificate} is gone: {_RENEW}")
        pair = Pair(certificate.read_bytes(), key.read_bytes())
        if not belong_together(pair) or not authority.signed(pair.certificate):
            raise CommandError(f"{certificate} is not of this deployment, or the key does not belong to it: {_RENEW}")
        missing = [name for name in names if name not in self._names(node)]
        if asked and missing:
            raise CommandError(f"{certificate} is not for {', '.join(missing)}: {_RENEW} and the same --hosts")
        self._secrets.mend(certificate)
        self._secrets.mend(key)

    def _write_node(self, node: str, pair: Pair) -> None:
        self._secrets.put(self.layout.node_key(node), pair.key)
        self._secrets.put(self.layout.node_certificate(node), pair.certificate)

    def _ensure_seed(self, user: str) -> None:
        path = self.layout.seed(user)
        if not path.exists():
            self._secrets.create(path, new_seed())
        self._secrets.mend(path)
        if self.layout.next_seed(user).exists():
            self._secrets.mend(self.layout.next_seed(user))

    def _check_users(self) -> None:
        missing = [str(self.layout.seed(user)) for user in USERS if not self.layout.seed(user).exists()]
        if missing:
            raise CommandError(f"{', '.join(missing)}: no such file; make the deployment with  fiq init  first")

    def _keys(self, user: str) -> list[str]:
        keys = []
        for path in (self.layout.seed(user), self.layout.next_seed(user)):
            if path.exists():
                try:
                    keys.append(public_key(path.read_bytes()))
                except ValueError as error:
                    raise CommandError(f"{path} is {error}: restore it, or remove it to get a new one") from None
        return list(dict.fromkeys(keys))

    def _accounts(self) -> bytes:
        return accounts({user: self._keys(user) for user in USERS}).encode()

    def _write_nats(self, *, encrypt: bool = False) -> None:
        nats = self.layout.nats
        self._secrets.put(nats / "accounts.conf", self._accounts())
        self._secrets.put(nats / "client-tls.conf", client_tls().encode())
        self._secrets.put(nats / "route-tls.conf", route_tls().encode())
        path = nats / "at-rest.conf"
        if path.exists():  # another key would make what is stored unreadable
            if encrypt and at_rest("") == path.read_text(encoding="utf-8"):
                raise CommandError(f"{path} says that the disks are not encrypted: see docs/security.md")
            self._secrets.mend(path)
            return
        key = random.token_urlsafe(_AT_REST_BYTES) if encrypt else ""
        self._secrets.create(path, at_rest(key).encode())

    def _ensure_token(self) -> None:
        """Create the first API token: the file for clients has the token, the one for ingest its hash."""
        if not self.layout.tokens.exists():
            secret = tokens.new_secret()
            made = Token(_TOKEN, tokens.digest_of(secret), frozenset({Scope.READ, Scope.WRITE}))
            self._secrets.put(self.layout.token(_TOKEN), f"{secret}\n".encode())
            self._secrets.create(self.layout.tokens, tokens.render([made]).encode())
        for path in (self.layout.tokens, *self.layout.clients.glob("*.token")):
            self._secrets.mend(path)

    def _ensure_password(self) -> None:
        path = self.layout.grafana_password
        if not path.exists():
            self._secrets.create(path, f"{random.token_urlsafe(_PASSWORD_BYTES)}\n".encode())
        self._secrets.mend(path)

    def _ensure_environment(self, hosts: dict[str, str]) -> None:
        if not self.layout.environment.exists():
            self._secrets.create(self.layout.environment, dotenv(self.users, hosts).encode())


def new_seed() -> bytes:
    """Return a new seed of a user: 58 characters and a line end."""
    return bytes(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)) + b"\n"


def dotenv(users: Mapping[ContainerRole, FileOwner], hosts: Mapping[str, str]) -> str:
    """Return the text of ``.env``; *hosts* maps nodes to machines, and is empty for one machine."""
    text = _template("env").format(users="\n".join(f"{role.variable}={users[role]}" for role in ContainerRole))
    if not hosts:
        return text
    return text + _template("env-hosts").format(
        nodes="\n".join(f"#NODE_NAME={node}\n#NODE_HOST={host}" for node, host in hosts.items()),
        url=",".join(_url(host, 4222) for host in hosts.values()),
        routes=_list([_url(host, 6222) for host in hosts.values()]),
    )


def _template(name: str) -> str:
    return (Path(__file__).parent / f"{name}.template").read_text(encoding="utf-8")


def _url(host: str, port: int) -> str:
    return f"nats://[{host}]:{port}" if ":" in host else f"nats://{host}:{port}"


def _list(urls: Sequence[str]) -> str:
    return "'[" + ", ".join(f'"{url}"' for url in urls) + "]'"


# -- The files that nats.conf includes -------------------------------------------------------------------------------

_STREAMS = (STREAM, DEAD_STREAM)
#: subjects of the placement keys
_KEYS = f"{BUCKET_PREFIX}.>"
#: what the streams' account may ask all nodes, and on which subject: the same as /varz and /healthz of the monitoring
#: port
_QUESTIONS = {"VARZ": NODES_STATE, "HEALTHZ": NODES_HEALTH}

_HEADER = "# Written by `fiq init`, which overwrites changes made here. See docs/security.md.\n"

#: an answer to a request of the service API: one, within 10 s
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
    """Return client-tls.conf: the handshake comes before anything, even the server's INFO."""
    return f"{_HEADER}\n{_TLS.format(last='handshake_first: true')}"


def route_tls() -> str:
    """Return route-tls.conf: both sides show a certificate of the deployment's authority."""
    return f"{_HEADER}\n{_TLS.format(last='verify: true')}"


def at_rest(key: str) -> str:
    """Return at-rest.conf: AES-GCM with a key derived from *key*; without one the disk is not encrypted."""
    if not key:
        return f"{_HEADER}# The disk is not encrypted: the deployment was made without --encrypt.\n"
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


# -- The permissions of each NATS user: exactly the subjects that its role uses, found by tracing it -----------------
#
# A user that may ask for a message (``STREAM.MSG.GET``, ``DIRECT.GET``), create a consumer or take a snapshot can read
# events, which are medical data: the services and ``ops`` may, the provisioner may not.


@dataclass(frozen=True, slots=True)
class Permissions:
    """Subjects that a user may publish on and subscribe to; with *answers* also on the reply subject of a request."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    answers: bool = False


def _api(*suffixes: str) -> tuple[str, ...]:
    return tuple(f"$JS.API.{suffix}" for suffix in suffixes)


def _each(pattern: str) -> tuple[str, ...]:
    return tuple(pattern.format(stream) for stream in _STREAMS)


def _inbox(role: Role) -> str:
    return f"{inbox_prefix(role)}.>"


#: what both services ask for their metrics: state, backlog, age of the oldest event, placements, live persisters
_WATCH = (
    *_api(*_each("STREAM.INFO.{}"), f"DIRECT.GET.{STREAM}"),
    *_api(*(f"{verb}.{BUCKET_STREAM}" for verb in ("STREAM.INFO", "STREAM.MSG.GET", "DIRECT.GET"))),
    f"$SRV.INFO.{PERSISTER_SERVICE}",
    # memory and storage of every node, and whether it stores anything
    NODES_STATE,
    NODES_HEALTH,
)

PERMISSIONS: dict[Role, Permissions] = {
    Role.INGEST: Permissions(
        publish=(
            EVENTS_SUBJECT,
            *_WATCH,
            # a client must see what it was told is stored: only the stream's leader is sure to have it
            *_api(f"STREAM.MSG.GET.{STREAM}"),
            # dead letters: an operator reads them through ingest, and removes one by its sequence
            *_api(f"STREAM.MSG.GET.{DEAD_STREAM}", f"STREAM.MSG.DELETE.{DEAD_STREAM}"),
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
                # <consumer>.fi.events.<partition>.*: the filter is in the subject, with a literal asterisk
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
            _KEYS,  # a put is a publish: persisters that see one read the bucket again
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
                # `nats backup stream`
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
            f"$JS.ACK.{DEAD_STREAM}.>",
            *_each("$JS.SNAPSHOT.ACK.{}.>"),
            *(f"$SRV.{verb}{tail}" for verb in ("PING", "INFO", "STATS") for tail in ("", ".>")),
            # `fiq doctor`: every node, without its monitoring port
            NODES_STATE,
            NODES_HEALTH,
            # `nats account info`: who this connection is and what it may; `nats server check connection`: a message to
            # itself
            "$SYS.REQ.USER.INFO",
            _inbox(Role.OPS),
        ),
        subscribe=(_inbox(Role.OPS),),
    ),
    Role.PLACEMENT: Permissions(
        # with `nats kv get` and `nats kv del`
        publish=(*_WATCH, *_api(f"DIRECT.GET.{BUCKET_STREAM}.>"), _KEYS),
        subscribe=(_inbox(Role.PLACEMENT),),
    ),
}
