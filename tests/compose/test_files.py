"""What compose makes of the files, and what it must refuse."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.cli.init.files import CONTAINER_USERS, ContainerRole, FileOwner, Layout
from services.core.settings import variables
from services.ingest.settings import Settings
from tests.support.compose.engine import ROOT, docker
from tests.support.compose.stack import DEPLOYMENT

#: what `fiq init` and the operator of a host write
HOST = {
    "NODE_NAME": "n1",
    "NODE_HOST": "a.example",
    "NODE_ADDRESS": "192.0.2.1",
    "NODE_ROUTES": '["nats://a.example:6222"]',
    "FI_LOG_URL": "nats://a.example:4222",
}
DEPLOY = ROOT / "docs" / "deploy-several-hosts.md"
SECURITY = ROOT / "docs" / "security.md"
FILES = ("compose.yaml", "compose.host.yaml")
#: what says which images run; the first two on each of several hosts
IMAGES = ("FIQ_IMAGE", "NATS_IMAGE", "HAPROXY_IMAGE", "PROMETHEUS_IMAGE", "GRAFANA_IMAGE", "NATS_EXPORTER_IMAGE")
#: the nodes of the cluster
NODES = {"compose.yaml": ("n1", "n2", "n3"), "compose.host.yaml": ("node",)}
#: services that do their work and end
ONE_SHOT = {"volumes", "provision", "ops", "placement"}
#: seconds that a persister gets at least: its last commit and checkpoint on a slow disk
CHECKPOINT = 30
#: fields of 1.29 that Compose v2 does not print, or prints otherwise, are not compared: it only has to take the file
V1 = "docker-compose"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The deployment's files without secrets; nothing reads those here."""
    shutil.copytree(DEPLOYMENT, tmp_path / "fiq", ignore=shutil.ignore_patterns("secrets", ".env"))
    return tmp_path / "fiq"


def config(folder: Path, file: str, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return what Compose v2 makes of *file* with HOST and *env* in .env."""
    variables = {**HOST, **(env or {})}
    (folder / ".env").write_text("".join(f"{name}='{value}'\n" for name, value in variables.items()))
    text = docker("compose", "-f", file, "--profile", "*", "config", cwd=folder)
    found: dict[str, Any] = yaml.safe_load(text)
    return found


@pytest.mark.parametrize("file", FILES)
def test_nothing_has_rights_that_it_does_not_need(engine: None, folder: Path, file: str) -> None:
    """Every container: no capability, nothing to write to but volumes, no new privileges, bounded in every way."""
    for name, service in config(folder, file)["services"].items():
        assert ["ALL"] == service["cap_drop"], name
        assert (["CHOWN"] if name == "volumes" else []) == service.get("cap_add", []), name
        assert service["read_only"] is True, name
        assert ["no-new-privileges:true"] == service["security_opt"], name
        assert {"max-size", "max-file"} == service["logging"]["options"].keys(), name
        assert int(service["mem_limit"]) > 0, name
        assert service["pids_limit"] > 0, name
        assert "privileged" not in service, name


@pytest.mark.parametrize("file", FILES)
def test_what_ends_or_hangs_is_seen_and_started_again(engine: None, folder: Path, file: str) -> None:
    """Each service that is to last has a restart policy and a check of its own: `up --wait` would wait for nothing."""
    for name, service in config(folder, file)["services"].items():
        if name in ONE_SHOT:
            assert service["restart"] in {"no", "on-failure"}, name
            assert service["healthcheck"]["disable"] is True, name
        else:
            assert "unless-stopped" == service["restart"], name
            assert "CMD" == service["healthcheck"]["test"][0], name
            assert len(service["healthcheck"]["test"]) > 1, name


@pytest.mark.parametrize("file", FILES)
def test_what_is_stopped_has_the_time_that_it_takes(engine: None, folder: Path, file: str) -> None:
    """The engine kills what is still there at the end: a lame duck, requests in flight, the last checkpoint."""
    services = config(folder, file)["services"]
    conf = (folder / "nats.conf").read_text(encoding="utf-8")
    lame_duck = re.findall(r'^lame_duck_(?:duration|grace_period): "(\w+)"$', conf, re.MULTILINE)
    assert 2 == len(lame_duck)
    for node in NODES[file]:
        assert "SIGUSR2" == services[node]["stop_signal"]
        assert sum(map(seconds, lame_duck)) <= seconds(services[node]["stop_grace_period"]), node
    (shutdown,) = (variable.default for variable in variables(Settings) if variable.name == "FI_SHUTDOWN_GRACE")
    assert shutdown < seconds(services["ingest"]["stop_grace_period"])
    assert seconds(services["persister"]["stop_grace_period"]) >= CHECKPOINT


def seconds(duration: str) -> float:
    """Return a time as compose and nats-server write it: ``45s``, ``1m30s``."""
    match = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", duration)
    assert match is not None, duration
    return 60 * int(match[1] or 0) + int(match[2] or 0)


@pytest.mark.parametrize("file", FILES)
def test_each_image_can_be_another_one(engine: None, folder: Path, file: str) -> None:
    """From a registry of one's own, which has its own names, or by a digest."""
    names = {"compose.yaml": IMAGES, "compose.host.yaml": IMAGES[:2]}[file]
    wanted = {name: f"registry.example/{name.lower()}@sha256:{'0' * 64}" for name in names}
    services = config(folder, file, wanted)["services"]
    assert set(wanted.values()) == {service["image"] for service in services.values()}


def test_the_nodes_network_can_be_cut_off_from_everything_outside(engine: None, folder: Path) -> None:
    """Clients, Prometheus and the balancer are on the other one. Both composes take the variable as a truth."""
    for value, internal in (("", False), ("true", True)):
        found = config(folder, "compose.yaml", {"FIQ_LOG_INTERNAL": value})
        networks = {name: bool(network.get("internal")) for name, network in found["networks"].items()}
        assert {"log": internal, "front": False} == networks
        for node in NODES["compose.yaml"]:
            assert ["log"] == list(found["services"][node]["networks"])
        if shutil.which(V1):
            text = subprocess.run(
                [V1, "-f", "compose.yaml", "config"], cwd=folder, capture_output=True, text=True, check=True, timeout=60
            ).stdout
            assert internal == bool(yaml.safe_load(text)["networks"]["log"].get("internal"))


@pytest.mark.parametrize("file", FILES)
def test_only_volumes_is_started_as_root(engine: None, folder: Path, file: str) -> None:
    """And it ends before anything else begins. The images of some others name a user of their own."""
    users = {name: service.get("user") for name, service in config(folder, file)["services"].items()}
    assert {"volumes"} == {name for name, user in users.items() if user == "0:0"}
    assert {name for name, user in users.items() if user is None} <= {"prometheus", "nats-exporter"}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("default", [True, False], ids=["defaults", "variables"])
def test_a_container_mounts_what_belongs_to_its_user(engine: None, folder: Path, file: str, default: bool) -> None:
    """Secrets as `fiq init` gives them away, volumes as `volumes` does: no two roles can read the same."""
    users = CONTAINER_USERS if default else {role: FileOwner(7000 + n, 7) for n, role in enumerate(ContainerRole)}
    found = config(folder, file, {} if default else {role.variable: str(user) for role, user in users.items()})
    layout, services = Layout(folder), found["services"]
    given = re.findall(r"chown (\S+) ([\w ]+)", services.pop("volumes")["command"][-1])
    owners = {volume: owner for owner, volumes in given for volume in volumes.split()}
    mounted = set()
    for name, service in services.items():
        secrets = [Path(found["secrets"][one["source"]]["file"]) for one in service.get("secrets", [])]
        for mount in service.get("volumes", []):
            if mount["type"] == "bind":
                secrets.append(Path(mount["source"]))
            elif mount["source"] != "prometheus":  # its image's user has it
                assert service["user"] == owners[mount["source"]], name
        for path in secrets:
            role = layout.container_of(path)
            assert role is not None or path == layout.ca_certificate or layout.secrets not in path.parents, path
            assert role is None or service["user"] == str(users[role]), (name, path)
            mounted.add(role)
    assert len(set(users.values())) == len(ContainerRole)
    here = {ContainerRole.NODES, ContainerRole.INGEST, ContainerRole.PERSISTER}
    assert (set(ContainerRole) if file == "compose.yaml" else here) == mounted - {None}


def test_no_port_is_open_beyond_loopback(engine: None, folder: Path) -> None:
    """One host: who wants more says so in .env."""
    services = config(folder, "compose.yaml")["services"]
    addresses = {port["host_ip"] for service in services.values() for port in service.get("ports", [])}
    assert {"127.0.0.1"} == addresses


def test_of_a_host_only_the_nodes_ports_are_open_to_the_others(engine: None, folder: Path) -> None:
    """Ingest and all metrics stay on loopback until FIQ_ADDRESS and METRICS_ADDRESS say otherwise."""

    def opened(env: Mapping[str, str]) -> set[tuple[str, str, int]]:
        services = config(folder, "compose.host.yaml", env)["services"]
        ports = [(name, port) for name, service in services.items() for port in service.get("ports", [])]
        return {(name, port["host_ip"], port["target"]) for name, port in ports}

    nodes = {("node", "192.0.2.1", 4222), ("node", "192.0.2.1", 6222)}
    metrics = {("ingest", 7101), ("persister", 7002)}
    assert nodes | {("ingest", "127.0.0.1", 7001)} | {(a, "127.0.0.1", b) for a, b in metrics} == opened({})
    inner = {"METRICS_ADDRESS": "192.0.2.7"}
    assert nodes | {("ingest", "127.0.0.1", 7001)} | {(a, "192.0.2.7", b) for a, b in metrics} == opened(inner)


@pytest.mark.parametrize("file", FILES)
def test_a_port_asks_who_comes_or_is_on_loopback(engine: None, folder: Path, file: str) -> None:
    """A node asks for a user or a certificate, ingest for a token, Grafana for a password; the others are told of."""
    asking = {("balancer", 7001), ("ingest", 7001), ("grafana", 3000)}
    asking |= {(node, port) for node in ("n1", "n2", "n3", "node") for port in (4222, 6222)}
    section = SECURITY.read_text().partition("Some ports ask for nothing")[2].partition("\n\n")[0]
    told = {int(port) for port in re.findall(r"\((\d{4})\)", section)}
    published = [
        (name, port) for name, service in config(folder, file)["services"].items() for port in service.get("ports", [])
    ]
    assert published
    for name, port in published:
        quiet = port["target"] in told and port["host_ip"] == "127.0.0.1"
        assert quiet or (name, port["target"]) in asking, (name, port)


def test_each_persister_of_a_host_has_a_port_for_its_metrics(engine: None, folder: Path) -> None:
    """One port could be published for one of them only; by default there are as many ports as persisters."""
    persister = config(folder, "compose.host.yaml")["services"]["persister"]
    (port,) = persister["ports"]
    first, last = map(int, port["published"].split("-"))
    assert (2, 2) == (persister["scale"], last - first + 1)


def test_a_host_without_a_node_starts_ingest_and_persisters_alone(engine: None, folder: Path) -> None:
    """With the variables and the command of docs/deploy-several-hosts.md, and nothing of a node."""
    section = DEPLOY.read_text().partition("**A host for ingest and persisters only**")[2]
    dotenv, command = re.findall(r"```sh\n(.+?)```", section, re.DOTALL)[:2]
    told = dict(re.findall(r"^ *(\w+)=(\S*)", dotenv, re.MULTILINE))
    words = command.split()
    assert ["docker", "compose", "up", "-d"] == words[:4]
    assert set(HOST) - {"FI_LOG_URL", "NODE_ROUTES"} <= told.keys()

    (folder / ".env").write_text("".join(f"{name}='{value}'\n" for name, value in {**HOST, **told}.items()))
    started = yaml.safe_load(docker("compose", "config", *words[4:], cwd=folder))
    assert {"ingest", "persister", "volumes"} == started["services"].keys()


def test_grafana_has_a_password_of_its_own(engine: None, folder: Path) -> None:
    """The one that `fiq init` made, from a file; and compose knows when it is there."""
    found = config(folder, "compose.yaml")
    grafana = found["services"]["grafana"]
    (secret,) = grafana["secrets"]
    assert grafana["environment"]["GF_SECURITY_ADMIN_PASSWORD__FILE"] == f"/run/secrets/{secret['target']}"
    assert Layout(folder).grafana_password == Path(found["secrets"][secret["source"]]["file"])
    assert "http://127.0.0.1:3000/api/health" == grafana["healthcheck"]["test"][-1]


@pytest.mark.parametrize("variable", sorted(HOST))
def test_a_host_without_a_name_is_refused(engine: None, folder: Path, variable: str) -> None:
    """Compose says which variable is missing, instead of starting a node that cannot be found."""
    text = "".join(f"{name}='{value}'\n" for name, value in HOST.items() if name != variable)
    (folder / ".env").write_text(text)
    command = ["docker", "compose", "-f", "compose.host.yaml", "config"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert 0 != done.returncode
    assert variable in done.stderr


@pytest.mark.parametrize("file", FILES)
def test_a_setting_in_dotenv_reaches_its_service(engine: None, folder: Path, file: str) -> None:
    """Also one that the file has no default for; one that is nowhere set is not there, which means its own default."""
    services = config(folder, file, {"FI_MAX_BACKLOG": "7", "FI_RETENTION": "36h", "FI_STORE": ""})["services"]
    ingest, persister = services["ingest"]["environment"], services["persister"]["environment"]
    assert ("7", "36h") == (ingest["FI_MAX_BACKLOG"], persister["FI_RETENTION"])
    assert ("", None) == (ingest["FI_STORE"], ingest["FI_MAX_EVENT_BYTES"])


@pytest.mark.parametrize("file", FILES)
def test_docker_compose_1_29_takes_the_files_too(engine: None, folder: Path, file: str) -> None:
    """It is what Debian 12 has. It starts the same services."""
    if shutil.which(V1) is None:
        if os.environ.get("FIQ_REQUIRE_DOCKER") == "1":
            pytest.fail(f"there is no {V1}")
        pytest.skip(f"there is no {V1}")
    services = config(folder, file, {"FI_MAX_BACKLOG": "7"})["services"]
    done = subprocess.run([V1, "-f", file, "config"], cwd=folder, capture_output=True, text=True, timeout=120)
    assert 0 == done.returncode, done.stderr
    found = yaml.safe_load(done.stdout)["services"]
    assert set(services) == set(found)
    assert ("7", None) == tuple(found["ingest"]["environment"][name] for name in ("FI_MAX_BACKLOG", "FI_RATE"))
