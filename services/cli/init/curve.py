"""The CURVE keys of a log without a broker (``fiq init FOLDER --curve NAMES``), in the format of ``zmq.auth``.

The persisters share one pair; each name is a client with a pair of its own. ``clients/`` has the public keys that
persisters let in: a key whose file is removed from there is refused after their next start.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from services.cli.errors import CommandError
from services.cli.init.files import FileOwner, Layout, Secrets

SERVER = "server"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}", re.ASCII)


def make_curve_keys(folder: Path, owner: FileOwner, names: Sequence[str]) -> list[str]:
    """Make the keys that are missing in *folder*; return what was done, a line each.

    Raises CommandError: a name is malformed, or a public key has lost its file.
    """
    for name in names:
        if _NAME.fullmatch(name) is None or name == SERVER:
            raise CommandError(f"--curve {name}: names are lower-case letters, digits and hyphens, but not {SERVER}")
    layout = Layout(folder.absolute())
    secrets = Secrets(layout.folder, owner)
    keys = layout.secrets / "zmq"
    clients = keys / "clients"
    for path in (layout.folder, layout.secrets, keys, clients):
        secrets.folder(path, owner=FileOwner.myself() if path == layout.folder else None)
    with secrets.alone(layout.secrets):
        secrets.put(layout.ignore, b"*\n")
        _ensure_pair(secrets, keys / f"{SERVER}.key_secret", keys / f"{SERVER}.key")
        for name in names:
            _ensure_pair(secrets, keys / f"{name}.key_secret", clients / f"{name}.key")
    return secrets.changes


def _ensure_pair(secrets: Secrets, secret: Path, public: Path) -> None:
    import zmq  # slow to import, and most of fiq init needs none of it

    if not secret.exists():
        if public.exists():
            raise CommandError(f"{public} exists, but {secret} does not: remove it to make a new pair")
        pair = zmq.curve_keypair()
        secrets.create(secret, _certificate(*pair))
        secrets.create(public, _certificate(pair[0]))
    for path in (secret, public):
        if path.exists():  # a public key is removed to shut its client out
            secrets.mend(path)


def _certificate(public: bytes, secret: bytes | None = None) -> bytes:
    lines = ["#  Made by fiq init.", "metadata", "curve", f'    public-key = "{public.decode()}"']
    if secret is not None:
        lines.append(f'    secret-key = "{secret.decode()}"')
    return "\n".join([*lines, ""]).encode()
