"""ZeroMQ sockets on the running event loop, where they are bound and connected, and who may use them.

pyzmq's asyncio layer costs 118 µs an event, a plain socket with ``loop.add_reader`` 19 (2026-11-27), so
:class:`LoopSocket` is the latter. Its descriptor (``ZMQ_FD``) says that the socket's state may have changed, and only
on an edge: after each wake-up all messages are read until EAGAIN, and after each send the state is looked at again,
because sending takes notice of what has arrived, too.

A DEALER with ``ZMQ_IMMEDIATE`` is writable exactly while it has a connection. So the end of a connection, such as the
kill of its other side, shows at once in the same wake-up.

Addresses:

``zmq+ipc://PATH``
    *PATH* is a directory with mode 0700, the socket of partition 3 of store ``main`` is ``PATH/main-03``, mode 0600.
    File permissions are the only access control. A socket is bound under a name of its own and then renamed, so a
    former owner, whose libzmq unlinks what it has bound, never removes the socket of the present one.
``zmq+tcp://HOST:PORT``
    Partition *p* is at *PORT* + *p*. CURVE encrypts and authenticates both sides; nothing is spoken without keys.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket as sockets
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import zmq
import zmq.auth
from zmq.utils import z85

from fiq.errors import ConfigurationError
from services.core.logs import get_logger
from services.log.errors import LogAccessError, LogUnavailableError
from services.log.partitions import partition_name
from services.log.settings import LogSettings

IPC, TCP = "zmq+ipc", "zmq+tcp"
#: the longest path of a Unix socket on Linux, bytes, without the closing NUL
MAX_PATH = 107
#: messages that are read in one go before the loop serves others
_MESSAGES_A_GO = 256
#: pauses between attempts to connect, milliseconds: the first one, and the longest
_RECONNECT_MS, _RECONNECT_MAX_MS = 20, 320
#: a handshake may take this long, milliseconds
_HANDSHAKE_MS = 3000
#: what a closed socket may still send, milliseconds
_LINGER_MS = 500
#: largest frame that is taken, bytes: the largest event (FI_MAX_EVENT_BYTES) and its answer in a page
MAX_FRAME = 65 << 20
#: where libzmq asks whether a key may connect (RFC 27)
_ZAP = "inproc://zeromq.zap.01"
_DOMAIN = "fiq"

#: as plain numbers: arithmetic with the enumerations of pyzmq takes microseconds
_EVENTS, _POLLIN, _POLLOUT, _NOBLOCK = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.POLLOUT), int(zmq.NOBLOCK)

_log = get_logger("zeromq")
_unique = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Keys:
    """The CURVE keys of one process, Z85.

    Attributes:
        public: its own public key.
        secret: its own secret key.
        server: the owners' public key; an owner has the same pair as all owners.
        clients: public keys that may connect to an owner; empty in ingest.
    """

    public: bytes
    secret: bytes
    server: bytes
    clients: frozenset[bytes] = frozenset()

    def __repr__(self) -> str:
        return f"Keys(public={self.public.decode('ascii', 'replace')})"


@dataclass(frozen=True, slots=True)
class Address:
    """Where the sockets of one store are.

    Attributes:
        url: as FI_LOG_URL has it.
        store: name of the store.
    """

    url: str
    store: str

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme == IPC:
            if not self.directory.is_absolute():
                raise ConfigurationError([f"FI_LOG_URL={self.url}: the directory must be an absolute path"])
            longest = len(os.fsencode(self.directory / f".{self.store}-00.4194304.999"))
            if longest > MAX_PATH:
                raise ConfigurationError(
                    [f"FI_LOG_URL={self.url}: the path is {longest - MAX_PATH} bytes too long for a Unix socket"]
                )
        elif parts.scheme != TCP or not parts.hostname or not parts.port:
            raise ConfigurationError([f"FI_LOG_URL={self.url}: expected zmq+ipc:///DIRECTORY or zmq+tcp://HOST:PORT"])

    @property
    def is_ipc(self) -> bool:
        """Whether it is a directory of Unix sockets."""
        return self.url.startswith(IPC)

    @property
    def directory(self) -> Path:
        """The directory of the Unix sockets."""
        parts = urlsplit(self.url)
        return Path(parts.netloc + parts.path)

    def path(self, partition: int) -> Path:
        """Return the Unix socket of *partition*."""
        return self.directory / f"{self.store}-{partition_name(partition)}"

    def endpoint(self, partition: int) -> str:
        """Return what ingest connects to."""
        if self.is_ipc:
            return f"ipc://{self.path(partition)}"
        parts = urlsplit(self.url)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        return f"tcp://{host}:{(parts.port or 0) + partition}"

    def prepare(self) -> None:
        """Make the directory of the Unix sockets, for an owner.

        Raises LogAccessError: others may enter it, or it cannot be made.
        """
        if not self.is_ipc:
            return
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.directory.stat()
        except OSError as error:
            raise LogAccessError(f"FI_LOG_URL={self.url}: cannot make the directory: {error.strerror}") from error
        if found.st_mode & 0o077 or found.st_uid != os.getuid():
            raise LogAccessError(
                f"FI_LOG_URL={self.url}: the directory must belong to this user and have mode 0700, or others could "
                "post: run `chmod 700` on it, or choose another one"
            )

    def bind(self, socket: zmq.Socket[bytes], partition: int) -> Callable[[], None]:
        """Bind *socket* for *partition*, whose file this process has open; return what removes the binding.

        Raises LogUnavailableError: the address is taken or not of this machine.
        """
        try:
            if self.is_ipc:
                return self._bind_path(socket, self.path(partition))
            endpoint = self._resolved(partition)
            socket.bind(endpoint)
            return lambda: socket.unbind(endpoint)
        except (zmq.ZMQError, OSError) as error:
            raise LogUnavailableError(f"cannot bind {self.endpoint(partition)}: {error.strerror}") from error

    def _bind_path(self, socket: zmq.Socket[bytes], path: Path) -> Callable[[], None]:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{next(_unique) % 1000}")
        socket.bind(f"ipc://{temporary}")
        temporary.chmod(0o600)
        temporary.rename(path)
        return lambda: path.unlink(missing_ok=True)

    def _resolved(self, partition: int) -> str:
        """Return the endpoint with an address in place of a name, which libzmq does not bind to."""
        parts = urlsplit(self.url)
        found = sockets.getaddrinfo(parts.hostname, (parts.port or 0) + partition, type=sockets.SOCK_STREAM)
        host, port = str(found[0][4][0]), int(found[0][4][1])
        return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def read_keys(settings: LogSettings, *, owner: bool) -> Keys | None:
    """Return the CURVE keys that the settings name; None for Unix sockets, which need none.

    Raises ConfigurationError: a key is missing or cannot be read.
    """
    if Address(settings.url, settings.store).is_ipc:
        return None
    wanted = {"FI_ZMQ_KEY_FILE": settings.zmq_key_file}
    wanted |= (
        {"FI_ZMQ_CLIENT_KEYS": settings.zmq_client_keys} if owner else {"FI_ZMQ_SERVER_KEY": settings.zmq_server_key}
    )
    problems = [f"{name} is not set; FI_LOG_URL={settings.url} needs it" for name, value in wanted.items() if not value]
    if problems:
        raise ConfigurationError([*problems, "make the keys with `fiq init`"])
    public, secret = _certificate("FI_ZMQ_KEY_FILE", settings.zmq_key_file)
    if secret is None:
        raise ConfigurationError([f"FI_ZMQ_KEY_FILE={settings.zmq_key_file} holds no secret key"])
    if not owner:
        return Keys(public, secret, _certificate("FI_ZMQ_SERVER_KEY", settings.zmq_server_key)[0])
    try:
        clients = zmq.auth.load_certificates(settings.zmq_client_keys)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            [f"FI_ZMQ_CLIENT_KEYS={settings.zmq_client_keys} cannot be read: {_why(error)}"]
        ) from None
    if not clients:
        raise ConfigurationError([f"FI_ZMQ_CLIENT_KEYS={settings.zmq_client_keys} holds no .key file"])
    return Keys(public, secret, public, frozenset(clients))


def _why(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or "it is missing, or not a key of CURVE"


def _certificate(variable: str, path: str) -> tuple[bytes, bytes | None]:
    try:
        return zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:  # its text quotes no key
        raise ConfigurationError([f"{variable}={path} cannot be read: {_why(error)}"]) from None


class LoopSocket:
    """A ZeroMQ socket whose messages are given to a callback on the running loop.

    Args:
        context: of the process.
        kind: ``zmq.DEALER`` or ``zmq.ROUTER``.
        on_message: called with the frames of each message.
        on_change: called when the socket gets writable, and when it is no longer.
        keys: of this process; None without encryption.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        kind: int,
        on_message: Callable[[list[bytes]], None],
        on_change: Callable[[bool], None] = lambda _: None,
        *,
        keys: Keys | None = None,
    ) -> None:
        self.writable = False
        self._on_message = on_message
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._scheduled = False
        self.socket = socket = context.socket(kind)
        socket.linger = _LINGER_MS
        socket.sndhwm = socket.rcvhwm = 0  # credit limits both
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
        socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
        socket.setsockopt(zmq.IPV6, 1)
        if keys is not None:
            _encrypt(socket, kind, keys)
        self._descriptor = int(socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._wake)
        self._schedule()

    def send(self, frames: list[bytes]) -> bool:
        """Send one message; False when there is no connection."""
        try:
            self.socket.send_multipart(frames, _NOBLOCK)
        except zmq.ZMQError:  # EAGAIN of a DEALER, EHOSTUNREACH of a ROUTER: nobody is there
            self._schedule()
            return False
        if self._events & _POLLIN:
            self._schedule()
        return True

    def close(self) -> None:
        """Close it; what was sent is still delivered for half a second."""
        if not self.socket.closed:
            self._loop.remove_reader(self._descriptor)
            self.socket.close()

    def _is_closed(self) -> bool:
        return self.socket.closed

    @property
    def _events(self) -> int:
        return int(self.socket.getsockopt(_EVENTS))

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._wake)

    def _wake(self) -> None:
        self._scheduled = False
        socket = self.socket
        if self._is_closed():
            return
        for _ in range(_MESSAGES_A_GO):
            try:
                frames = socket.recv_multipart(_NOBLOCK)
            except zmq.Again:
                break
            try:
                self._on_message(frames)
            except BaseException:
                self._schedule()  # the loop reports the fault; the messages after this one must not wait for the next
                raise
            if self._is_closed():
                return
        events = self._events
        if events & _POLLIN:
            self._schedule()
        writable = bool(events & _POLLOUT)
        if writable != self.writable:
            self.writable = writable
            self._on_change(writable)


def _encrypt(socket: zmq.Socket[bytes], kind: int, keys: Keys) -> None:
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    if kind == zmq.ROUTER:
        socket.curve_server = True
        socket.zap_domain = _DOMAIN.encode()
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without the handler below nobody gets in
    else:
        socket.curve_serverkey = keys.server


class KeyCheck:
    """Answers libzmq's question whether a client's key may connect (ZAP, RFC 27), for all sockets of a context.

    Args:
        context: of the process.
        allowed: public keys, Z85.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], allowed: Collection[bytes]) -> None:
        self._allowed = {z85.decode(key) for key in allowed}
        self._socket = LoopSocket(context, zmq.ROUTER, self._answer)
        self._socket.socket.bind(_ZAP)

    def close(self) -> None:
        """Let nobody in any more."""
        self._socket.close()

    def _answer(self, frames: list[bytes]) -> None:
        asker, _, version, request, _, address, _, mechanism, *credentials = frames
        known = mechanism == b"CURVE" and bool(credentials) and credentials[0] in self._allowed
        if not known:
            _log.warning("KEY_REFUSED", address=address.decode("ascii", "replace"), reason="not an allowed client key")
        status = (b"200", b"OK") if known else (b"400", b"unknown key")
        self._socket.send([asker, b"", version, request, *status, b"", b""])
