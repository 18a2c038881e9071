"""A deployment in a folder of its own: the compose file as it is, secrets by ``fiq init``, and its containers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import random
import re
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import orjson
from testcontainers.compose import DockerCompose

from services.cli.demo import AcceptedPost, Found, Load, Post, compare
from services.cli.init.files import Layout
from services.core.settings import load
from services.log.errors import LogUnavailableError
from services.log.jetstream.api import JetStreamApi
from services.log.jetstream.connection import Connection, Role, close, connect
from services.log.jetstream.stream import STREAM, read_stream
from services.log.settings import LogSettings
from services.log.status import StreamReport
from tests.support.compose.engine import PACE, PREFIX, ROOT, EngineError, clean_up, containers_of, docker, run
from tests.support.polling import eventually, eventually_sync

DEPLOYMENT = ROOT / "deploy" / "nats-cluster"
#: the image under test
IMAGE = f"{PREFIX}:image"
NODES = ("n1", "n2", "n3")
#: services that do their work and end
ONE_SHOT = {"volumes", "provision"}
#: where ports are looked for that stay the same over restarts: below those that the kernel, the engine and other tests
#: choose, since a port is chosen half a minute before the balancer binds it
_PORTS = range(8_300, 9_000)
#: settings that make a stack small; an empty port is one that the engine chooses, anew at each start of a container
SMALL = {
    "FIQ_IMAGE": IMAGE,
    "FI_STREAM_MAX_BYTES": "256MiB",
    "FI_DEAD_MAX_BYTES": "16MiB",
    "NATS_MAX_FILE_STORE": "1GB",
    "FIQ_HEALTH_INTERVAL": "5s",
    **dict.fromkeys(("NATS_PORT_1", "NATS_PORT_2", "NATS_PORT_3", "PROMETHEUS_PORT"), ""),
}
#: prints every event of the corpus, as it is committed, one line each
_DUMP = """
import base64, sys
from fiq.corpus import open_corpus
with open_corpus("/data") as corpus:
    for name in sorted(corpus):
        for event in corpus[name]:
            print(name, event.event_id, event.sequence, base64.b64encode(event.raw).decode())
"""


def public_images() -> list[str]:
    """Return the images that the deployment takes from elsewhere, and the one that its own is built on."""
    compose, dockerfile = (
        path.read_text(encoding="utf-8") for path in (DEPLOYMENT / "compose.yaml", ROOT / "Dockerfile")
    )
    return [
        *re.findall(r"\$\{(?:NATS|HAPROXY|PROMETHEUS)_IMAGE:-(.+?)\}", compose),
        *re.findall(r"^ARG PYTHON_IMAGE=(.+)$", dockerfile, re.MULTILINE),
    ]


class Deployment:
    """One compose project. Everything but :meth:`load` and :meth:`is_verified` blocks.

    Args:
        folder: for the copy of the compose file, its configuration and the secrets.
        name: told apart from the other projects of this process by it.
        env: variables on top of SMALL.
        files: the compose files.
    """

    def __init__(
        self, folder: Path, name: str, env: Mapping[str, str] | None = None, files: tuple[str, ...] = ("compose.yaml",)
    ) -> None:
        self.folder = folder
        self.project = f"{PREFIX}-{os.getpid()}-{name}"
        self.accepted: dict[str, AcceptedPost] = {}
        self.compose = DockerCompose(folder, compose_file_name=list(files))
        self.env = {**SMALL, "COMPOSE_PROJECT_NAME": self.project, "FIQ_PORT": f"{free_port()}", **(env or {})}

    # -- life ---------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Lay the folder out, as docs/deploy.md says."""
        lay_out(self.folder)
        # alerts fire sooner; promtool tests how long the real rules wait
        rules = self.folder / "prometheus" / "rules" / "alerts.yml"
        rules.write_text(rules.read_text(encoding="utf-8").replace("for: 30s", "for: 5s"), encoding="utf-8")
        self.configure(self.env)

    def configure(self, env: Mapping[str, str]) -> None:
        """Add variables to the deployment's .env."""
        with (self.folder / ".env").open("a", encoding="utf-8") as file:
            file.writelines(f"{name}={value}\n" for name, value in env.items())

    def up(self) -> None:
        """Start everything, and wait until all of it is healthy.

        Raises:
            EngineError: something is not; with the end of every log.
        """
        try:
            self.compose.start()
        except subprocess.CalledProcessError as error:
            raise EngineError(f"{error}\n{self.logs()}\n{self.complaints()}") from error

    def rolling_restart(self, *services: str, **variables: str) -> list[str]:
        """Restart *services*, everything by default, with the script of the deployment; return the steps that it says.

        What it waits for between them depends on the machine, and is left out.

        Raises:
            EngineError: it stopped; with that.
        """
        env = {"COMPOSE": " ".join(self.compose.docker_compose_command()), **variables}
        command = ("env", *(f"{name}={value}" for name, value in env.items()), "./rolling-restart", *services)
        said = run("sh", "-c", 'exec "$@" 2>&1', "sh", *command, cwd=self.folder, timeout=540)
        return re.findall(r"^rolling-restart: (?!waiting: )(.*)$", said, re.MULTILINE)

    def remove(self) -> None:
        """Remove containers, networks and volumes."""
        clean_up(self.project)

    def logs(self) -> str:
        """Return the end of what every container wrote."""
        return self("logs", "--no-color", "--tail", "40")

    def __call__(self, *arguments: str, timeout: float = 120) -> str:
        """Run ``docker compose ARGUMENT…`` in the project, and return its output."""
        command = self.compose.docker_compose_command()
        return docker(*command[1:], *arguments, cwd=self.folder, timeout=timeout)

    # -- parts --------------------------------------------------------------------------------------------------------

    def containers(self, *services: str) -> list[str]:
        """Return the ids of the containers of *services*, all by default, stopped ones too."""
        found = containers_of(self.project)
        return [container for container, service in found.items() if not services or service in services]

    def container(self, service: str) -> str:
        """Return the id of the only container of *service*."""
        (found,) = self.containers(service)
        return found

    def address(self, service: str, port: int) -> str:
        """Return ``host:port`` on this host of a published port, as it is now."""
        return docker("port", self.container(service), str(port)).splitlines()[0]

    @property
    def url(self) -> str:
        """Where clients post."""
        return f"http://{self.address('balancer', 7001)}"

    @property
    def token(self) -> str:
        """The API token that `fiq init` made for clients."""
        return Layout(self.folder).token("default").read_text(encoding="ascii").strip()

    # -- the log ------------------------------------------------------------------------------------------------------

    @property
    def settings(self) -> LogSettings:
        """How the ops user reaches the nodes that have a port just now, from this host."""
        addresses = []
        for node in NODES:
            with contextlib.suppress(EngineError):  # it is stopped, or disconnected
                addresses.append(self.address(node, 4222))
        return ops_settings(self.folder, addresses)

    async def leader(self) -> str:
        """Wait until a node leads the stream, and return its name."""
        async with reports(lambda: self.settings) as ask:

            async def led() -> str:
                stream = await ask()
                return stream.leader if stream is not None else ""

            return await eventually(led, 60, PACE)

    async def is_whole(self) -> None:
        """Wait until every copy of the stream has everything and every container is healthy."""
        await stream_is_whole(lambda: self.settings)
        await asyncio.to_thread(self.is_healthy)

    def is_healthy(self, timeout: float = 90) -> None:
        """Wait until every container is healthy."""
        try:
            eventually_sync(lambda: {"healthy"} == self.states(), timeout, PACE)
        except AssertionError:
            raise AssertionError(f"not healthy within {timeout:g} s: {self.complaints()}") from None

    def states(self) -> set[str]:
        """Return the health of every container of the project; ``exited`` for one that has ended."""
        template = "{{if .State.Running}}{{if .State.Health}}{{.State.Health.Status}}{{end}}{{else}}exited{{end}}"
        lasting = [one for one, service in containers_of(self.project).items() if service not in ONE_SHOT]
        return set(docker("inspect", "--format", template, *lasting).split()) if lasting else set()

    def complaints(self) -> dict[str, str]:
        """Return what the last health check of each container that is not healthy said."""
        found = [inspect(container) for container in self.containers()]
        health = {one["Name"]: one["State"].get("Health") or {} for one in found}
        return {
            name: (checks.get("Log") or [{}])[-1].get("Output", "")
            for name, checks in health.items()
            if checks and checks["Status"] != "healthy"
        }

    # -- load and corpus ----------------------------------------------------------------------------------------------

    def load(self, clients: int = 8) -> Load:
        """Return clients that post to the balancer, some posts twice; :meth:`count_in` takes their outcome."""
        return Load(self.url, clients=clients, repeats=0.05, token=self.token)

    async def post(self, load: Load, consultations: list[list[Post]]) -> None:
        """Post everything, until each event is accepted."""
        self.accepted.update((await load.run(consultations)).accepted)

    async def is_verified(self, timeout: float = 60) -> None:
        """Wait until HDF5 holds what clients were told, and assert that it is there once and in order."""
        wanted = len(self.accepted)

        async def all_there() -> bool:
            return len(await asyncio.to_thread(self.dump)) >= wanted

        await eventually(all_there, timeout, PACE)
        lines = await asyncio.to_thread(self.dump)
        verdict = compare(consultations_in(lines), self.accepted.values())
        assert [] == verdict.summary()
        assert wanted == verdict.persisted

    def dump(self) -> list[str]:
        """Return every event that the volume holds, a line each, consultation by consultation."""
        return self("exec", "-T", "persister", "python3", "-c", _DUMP).splitlines()


def consultations_in(lines: list[str]) -> Iterator[tuple[str, list[Found]]]:
    """Return the consultations of dumped lines, each with its events."""
    rows = (line.split(" ") for line in lines)
    for name, events in groupby(rows, key=lambda row: row[0]):
        yield name, [(event, int(sequence), base64.b64decode(raw)) for _, event, sequence, raw in events]


def ops_settings(folder: Path, addresses: list[str]) -> LogSettings:
    """Return how the ops user of the deployment in *folder* reaches nodes at *addresses*."""
    layout = Layout(folder)
    return load(
        LogSettings,
        {
            "FI_LOG_URL": ",".join(f"nats://{address}" for address in addresses) or "nats://127.0.0.1:1",
            "FI_NATS_CA_FILE": str(layout.ca_certificate),
            "FI_NATS_SEED_FILE": str(layout.seed(Role.OPS)),
        },
    )


@asynccontextmanager
async def reports(settings: Callable[[], LogSettings]) -> AsyncIterator[Callable[[], Awaitable[StreamReport | None]]]:
    """Yield a function that asks for the stream's state; None while there is no answer."""
    nc: Connection | None = None

    async def asked() -> StreamReport | None:
        nonlocal nc
        try:
            if nc is None:
                found = await asyncio.to_thread(settings)
                nc = await connect(found, name="test", role=Role.OPS, on_closed=lambda _: None, deadline=5)
            info = await JetStreamApi(nc).stream_info(STREAM)
            return None if info is None else read_stream(info)
        except LogUnavailableError:
            return None

    try:
        yield asked
    finally:
        if nc is not None:
            await close(nc)


async def stream_is_whole(settings: Callable[[], LogSettings]) -> None:
    """Wait until every copy of the stream has everything."""
    async with reports(settings) as ask:

        async def whole() -> bool:
            stream = await ask()
            return (
                stream is not None
                and len(stream.replicas) == len(NODES) - 1
                and all(replica.current and replica.alive for replica in stream.replicas)
            )

        await eventually(whole, 120, PACE)


def free_port(following: int = 0) -> int:
    """Return a free port of loopback whose *following* ports are free, too."""
    for port in random.sample(_PORTS, len(_PORTS)):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for one in range(port, port + following + 1):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", one))
            return port
    raise EngineError("no port is free")


def lay_out(folder: Path, *options: str) -> None:
    """Copy the deployment's files into *folder*, and make its secrets with ``fiq init``."""
    shutil.copytree(DEPLOYMENT, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("secrets", ".env"))
    user = f"{os.getuid()}:{os.getgid()}"
    docker("run", "--rm", "-u", user, "-v", f"{folder}:/deployment", IMAGE, "fiq", "init", "/deployment", *options)


def inspect(container: str) -> dict[str, Any]:
    """Return what the engine knows of a container."""
    found: dict[str, Any] = orjson.loads(docker("inspect", container))[0]
    return found
