"""Three hosts on one machine: a compose project each, with a network of its own, and one network as the wire."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.cli.init.files import Layout
from services.log.settings import LogSettings
from tests.support.compose.engine import PREFIX, EngineError, clean_up, docker, run
from tests.support.compose.stack import DEPLOYMENT, Deployment, free_port, lay_out, ops_settings

#: names of the machines, as `fiq init --hosts` gets them; a node each
HOSTS = ("host1", "host2", "host3")
#: files that a host needs of the secrets, besides its own node's; the authority's key stays with the operator
SHARED = (
    "ca.pem",
    "nats",
    "api",
    "users/ingest.seed",
    "users/persister.seed",
    "users/ops.seed",
    "users/placement.seed",
)
PARTITIONS = 6
#: as whom the containers run, where that can be chosen
OWNER = 12_000
#: of the first host, each with a port of its own for metrics
PERSISTERS = 2
#: what stands for the hosts' network cards
_WIRE = """\
services:
  node: { networks: { host: {}, wire: { aliases: ["${NODE_HOST}"] } } }
  provision: { networks: { host: {}, wire: {} } }
  ingest: { networks: { host: {}, wire: {} } }
  persister: { networks: { host: {}, wire: {} } }
  ops: { networks: { host: {}, wire: {} } }
  placement: { networks: { host: {}, wire: {} } }
networks:
  wire: { external: true, name: "${WIRE}" }
"""


class Hosts:
    """The machines of a deployment, and the folder of its operator."""

    def __init__(self, folder: Path) -> None:
        self.operator = folder / "operator"
        self.wire = f"{PREFIX}-{os.getpid()}-wire"
        self._folder = folder
        self.machines = [self._machine(index) for index in range(len(HOSTS))]

    def prepare(self) -> None:
        """Make the secrets, the wire, and the folder of each host."""
        # one user for everything, as for an operator who is not root; the deployment on one host has one for each role
        owner = ("--owner", f"{OWNER}:{OWNER}") if os.getuid() == 0 else ()
        lay_out(self.operator, "--hosts", ",".join(HOSTS), *owner)
        docker("network", "create", "--label", f"com.docker.compose.project={self.wire}", self.wire)
        for index in range(len(HOSTS)):
            self.equip(index)

    def equip(self, index: int) -> None:
        """Lay out the folder of a host: what docs/deploy-several-hosts.md says to copy there, and its .env."""
        machine = self.machines[index]
        shutil.rmtree(machine.folder, ignore_errors=True)
        ignored = shutil.ignore_patterns("secrets", ".env")
        shutil.copytree(DEPLOYMENT, machine.folder, ignore=ignored)
        (machine.folder / "wire.yaml").write_text(_WIRE)
        node = f"nodes/n{index + 1}"
        files = [".env", *(f"secrets/{path}" for path in (*SHARED, f"{node}.pem", f"{node}.key"))]
        if index == 0:
            files.append("secrets/users/provisioner.seed")
        run("cp", "-a", "--parents", *files, str(machine.folder), cwd=self.operator)
        machine.configure(machine.env)

    def remove(self) -> None:
        """Remove everything of all hosts, and the wire."""
        for machine in self.machines:
            machine.remove()
        clean_up(self.wire)

    @contextmanager
    def killed(self, index: int) -> Iterator[None]:
        """A host whose power is cut, and comes back at the end."""
        running = self.machines[index]("ps", "-q").split()
        docker("kill", "-s", "KILL", *running)
        try:
            yield
        finally:
            docker("start", *running)

    @contextmanager
    def cut_off(self, index: int) -> Iterator[None]:
        """A host that runs, and whose cable to the others is pulled out until the end."""
        machine = self.machines[index]
        node, others = machine.container("node"), machine("ps", "-q", "ingest", "persister").split()
        for container in (node, *others):
            docker("network", "disconnect", self.wire, container)
        try:
            yield
        finally:
            docker("network", "connect", "--alias", HOSTS[index], self.wire, node)
            for container in others:
                docker("network", "connect", self.wire, container)

    @property
    def settings(self) -> LogSettings:
        """How the ops user reaches the nodes that run."""
        addresses = []
        for machine in self.machines:
            with contextlib.suppress(EngineError, ValueError):  # it is away
                addresses.append(machine.address("node", 4222))
        return ops_settings(self.operator, addresses)

    @property
    def token(self) -> str:
        """The API token that the operator gives to clients; every host takes it."""
        return Layout(self.operator).token("default").read_text(encoding="ascii").strip()

    def _machine(self, index: int) -> Deployment:
        env = {
            "NODE_NAME": f"n{index + 1}",
            "NODE_HOST": HOSTS[index],
            "NODE_ADDRESS": "127.0.0.1",
            "NATS_PORT": "",
            "NATS_ROUTE_PORT": "",
            "INGEST_METRICS_PORT": "",
            "PERSISTER_METRICS_PORTS": "",
            "WIRE": self.wire,
            "FI_VOLUMES": f"{len(HOSTS)}",
            "FI_PARTITIONS": f"{PARTITIONS}",
            "FIQ_PERSISTERS": "1",
        }
        if index == 0:
            first = free_port(PERSISTERS - 1)
            env["FIQ_PERSISTERS"] = f"{PERSISTERS}"
            env["PERSISTER_METRICS_PORTS"] = f"{first}-{first + PERSISTERS - 1}"
        files = ("compose.host.yaml", "wire.yaml")
        return Deployment(self._folder / HOSTS[index], HOSTS[index], env, files)
