"""A cluster with the security of a real deployment, and processes that are let in, or not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from services.cli.embedded.processes import Cluster
from services.cli.init.deployment import Deployment
from services.cli.init.files import FileOwner, Layout
from services.cli.init.keys import Authority, Pair
from services.log.jetstream.connection import Connection, Role, close, connect
from services.log.settings import LogSettings

_VIOLATION = re.compile(r"Permissions Violation.*")


def make_deployment(folder: Path, *, encrypt: bool = False) -> Layout:
    """Do what ``fiq init`` does, for this process's own user."""
    deployment = Deployment(folder, FileOwner.myself())
    deployment.complete(encrypt=encrypt)
    return deployment.layout


@dataclass(frozen=True)
class Secured:
    """Three nodes with TLS and users, and the folder of their deployment."""

    cluster: Cluster
    layout: Layout

    @property
    def deployment(self) -> Deployment:
        """Renews what is in the folder."""
        return Deployment(self.layout.folder, FileOwner.myself())

    def environment(self, role: Role) -> dict[str, str]:
        """Return the variables of a process in *role*."""
        return {
            "FI_LOG_URL": self.cluster.url,
            "FI_NATS_CA_FILE": str(self.layout.ca_certificate),
            "FI_NATS_SEED_FILE": str(self.layout.seed(role)),
            "FI_PROVISION": "false",
        }

    def settings(self, role: Role, **changes: Any) -> LogSettings:
        """Return the log's settings of a process in *role*."""
        own = {
            "servers": tuple(self.cluster.urls),
            "ca_file": str(self.layout.ca_certificate),
            "seed_file": str(self.layout.seed(role)),
            "provision": False,
        }
        return LogSettings(**{**own, **changes})

    @asynccontextmanager
    async def connected(self, role: Role, **changes: Any) -> AsyncIterator[Connection]:
        """Connect as *role*."""
        nc = await connect(self.settings(role, **changes), name=f"test {role}", role=role, on_closed=lambda _: None)
        assert isinstance(nc, Connection)
        try:
            yield nc
        finally:
            await close(nc)

    def violations(self) -> list[str]:
        """Return what the nodes' logs say of refused subjects, since the nodes were started first."""
        logs = [node.log.read_text(errors="replace") for node in self.cluster.nodes]
        return [found for log in logs for found in _VIOLATION.findall(log)]


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    errors: list[str]


def fiq(environment: dict[str, str], *arguments: str) -> Outcome:
    """Run the command line as a process of its own, with these variables and none of the machine's."""
    return run("services.cli.main", environment, *arguments)


#: free ones for whichever service it is
PORTS = {"FI_PORT": "0", "FI_MANAGEMENT_PORT": "0", "FI_PERSISTER_PORT": "0"}


def run(module: str, environment: dict[str, str], *arguments: str) -> Outcome:
    """Run ``python -m MODULE`` until it ends by itself."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("FI_")}
    env |= {"FI_ALLOW_EPHEMERAL": "1"} | environment  # folders of tests may be in memory
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    return Outcome(done.returncode, done.stdout, done.stderr.splitlines())


def replace_certificate(layout: Layout, node: str, *, start: datetime, lifetime: timedelta, hosts: list[str]) -> None:
    """Give *node* a certificate of the deployment's authority that an operator would not make."""
    authority = Authority(Pair(layout.ca_certificate.read_bytes(), layout.ca_key.read_bytes()))
    pair = authority.sign(node, hosts, start=start, lifetime=lifetime)
    layout.node_certificate(node).write_bytes(pair.certificate)
    layout.node_key(node).write_bytes(pair.key)
