"""rolling-restart restarts nothing while a node or a copy is missing. Stand-ins of compose and docker record calls.

The answers in monitoring/ were recorded from three nodes of nats-server 2.15.1 with the streams, and shortened:
n1 leads the metadata and `fi-dead`, n3 leads `fi-events`, n2 leads nothing.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[3] / "deploy" / "nats-cluster" / "rolling-restart"
ANSWERS = Path(__file__).parent / "monitoring"
NODES = ("n1", "n2", "n3")
#: answers with the files of the service's folder, as wget would: the first one that is not there is the end of it
COMPOSE = """\
#!/bin/sh
cd "${0%/*}/.."
case $1 in
exec)
    service=$3
    for word; do
        case $word in
        http://127.0.0.1:8222/*) word=${word##*/}; cat "$service/${word%%[?]*}" || exit 1; found=yes ;;
        esac
    done
    [ -n "${found:-}" ] ;;
ps) echo "$3-1"; echo "$3-2" ;;
*) echo "$*" >> done; [ ! -e "after $*" ] || sh "after $*" ;;
esac
"""
DOCKER = """\
#!/bin/sh
cd "${0%/*}/.."
case $1 in
inspect) echo healthy ;;
*) echo "docker $*" >> done ;;
esac
"""
REFUSED = "nothing more is restarted"


class Project:
    """A compose project of nodes that say what they are told to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: list[str] = []
        (folder / "bin").mkdir()
        for name, text in (("compose", COMPOSE), ("docker", DOCKER)):
            self.program(name, text)

    def program(self, name: str, text: str) -> None:
        """Put a command before those of the machine."""
        (self.folder / "bin" / name).write_text(text)
        (self.folder / "bin" / name).chmod(0o755)

    def node(self, service: str, server: str, routez: object = None, jsz: object = None) -> None:
        """Let *service* be the node *server*, with its answers in monitoring/ or with others."""
        place = self.folder / service
        place.mkdir(exist_ok=True)
        (place / "healthz").write_text('{"status":"ok"}')
        for path, other in (("routez", routez), ("jsz", jsz)):
            (place / path).write_text(json.dumps(answer(server, path) if other is None else other, indent=2))

    def restart(self, *services: str, nodes: str = "n1 n2 n3") -> tuple[int, list[str], str]:
        """Run the script; return its exit code, what it did, and what it said last."""
        (self.folder / "done").write_text("")
        env = {
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "COMPOSE": str(self.folder / "bin" / "compose"),
            "FIQ_NODES": nodes,
            "FIQ_TIMEOUT": "0",
            "FIQ_SETTLE": "0",
        }
        done = subprocess.run(
            [SCRIPT, *services], env=env, cwd=self.folder, capture_output=True, text=True, timeout=60, check=False
        )
        self.said = done.stderr.splitlines()
        return done.returncode, (self.folder / "done").read_text().splitlines(), self.said[-1]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Three nodes that are whole."""
    found = Project(tmp_path)
    for node in NODES:
        found.node(node, node)
    return found


@pytest.fixture
def host(tmp_path: Path) -> Project:
    """One of three hosts, without a node yet."""
    return Project(tmp_path)


def answer(server: str, path: str) -> Any:
    return json.loads((ANSWERS / f"{server}-{path}.json").read_text())


def group(jsz: Any, name: str) -> Any:
    """Return the part of an answer about a stream, or about the metadata."""
    if name == "meta":
        return jsz["meta_cluster"]
    streams = jsz["account_details"][0]["stream_detail"]
    return next(stream["cluster"] for stream in streams if stream["name"] == name)


def without(server: str, away: str) -> Any:
    """Return what *server* says of its routes when *away* has none."""
    routez = answer(server, "routez")
    routez["routes"] = [route for route in routez["routes"] if route["remote_name"] != away]
    return routez


def restarted(*nodes: str) -> list[str]:
    return [f"{action} {node}" for node in nodes for action in ("stop", "up -d")]


def test_a_whole_cluster_is_restarted_node_by_node(project: Project) -> None:
    """That a follower calls other followers' copies not current means nothing: it does not hear of them."""
    assert '"current": false' in (ANSWERS / "n2-jsz.json").read_text()
    assert (0, restarted("n1", "n2", "n3")) == project.restart(*NODES)[:2]


def test_a_misspelt_setting_is_named(project: Project) -> None:
    """Compose would not hand it on, and nothing else would notice."""
    (project.folder / "compose.yaml").write_text("  FI_RATE:\n  FI_STARTUP_TIMEOUT: ${FI_STARTUP_TIMEOUT:-120}\n")
    (project.folder / ".env").write_text("# FI_NOTE=1\nFI_RATE=5\nFI_RAET=7\nFI_STARTUP_TIMEOUT=9\nFIQ_PORT=1\n")
    assert 0 == project.restart("n1")[0]
    warnings = [line for line in project.said if "warning" in line]
    assert [
        "rolling-restart: warning: .env sets FI_RAET, which no compose file hands on: see docs/settings.md"
    ] == warnings


@pytest.mark.parametrize("state", [{"current": False}, {"offline": True}], ids=["behind", "offline"])
@pytest.mark.parametrize(("leader", "name"), [("n1", "meta"), ("n1", "fi-dead"), ("n3", "fi-events")])
@pytest.mark.parametrize("service", ["its own name", "node"])
def test_nothing_is_restarted_while_a_copy_is_behind(
    host: Project, service: str, leader: str, name: str, state: dict[str, bool]
) -> None:
    """Its leader says so, which is known by the server's name: its service has another one on one of several hosts."""
    jsz = answer(leader, "jsz")
    group(jsz, name)["replicas"][-1] |= state
    service = leader if service == "its own name" else service
    host.node(service, leader, jsz=jsz)
    code, done, said = host.restart(nodes=service)
    assert (1, []) == (code, done)
    assert f"{leader} leads, and a copy is behind; {REFUSED}" in said


@pytest.mark.parametrize("away", NODES)
@pytest.mark.parametrize("path", ["healthz", "routez", "jsz"])
def test_nothing_is_restarted_while_a_node_does_not_answer(project: Project, away: str, path: str) -> None:
    """Whatever it was asked for: it is not there, or not well."""
    (project.folder / away / path).unlink()
    code, done, said = project.restart(*NODES)
    assert (1, []) == (code, done)
    assert f"{away} does not answer, or is not healthy; {REFUSED}" in said
    assert f"rolling-restart: waiting: {away} does not answer, or is not healthy" == project.said[0]


@pytest.mark.parametrize(("server", "away"), [("n1", "n2"), ("n2", "n1"), ("n2", "n3"), ("n3", "n1")])
def test_on_a_host_nothing_is_restarted_while_another_hosts_node_is_away(host: Project, server: str, away: str) -> None:
    """Its routes are gone at once; leaders call its copies current for a while, and followers know nothing of them."""
    host.node("node", server, routez=without(server, away))
    code, done, said = host.restart("node", nodes="node")
    assert (1, []) == (code, done)
    assert f"{server} sees 1 of 2 other nodes; {REFUSED}" in said


@pytest.mark.parametrize("server", NODES)
def test_on_a_host_the_node_is_restarted_when_it_sees_all_others(host: Project, server: str) -> None:
    """It need not lead anything."""
    host.node("node", server)
    assert (0, restarted("node")) == host.restart("node", nodes="node")[:2]


@pytest.mark.parametrize("name", ["meta", "fi-events", "fi-dead"])
def test_nothing_is_restarted_during_an_election(host: Project, name: str) -> None:
    """Without a leader the state of the copies is unknown."""
    jsz = answer("n2", "jsz")
    del group(jsz, name)["leader"]
    host.node("node", "n2", jsz=jsz)
    code, done, said = host.restart("node", nodes="node")
    assert (1, []) == (code, done)
    assert f"n2 knows of no leader; {REFUSED}" in said


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda project: (project.folder / "n2" / "routez").write_text(""), "n2 does not report its name"),
        (lambda project: project.program("awk", "#!/bin/sh\nexit 1\n"), "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_not_whole(project: Project, spoil: Callable[[Project], object], why: str) -> None:
    """Silence would be taken for consent."""
    spoil(project)
    code, done, said = project.restart(*NODES)
    assert (1, []) == (code, done)
    assert why in said


def test_it_stops_when_a_node_does_not_come_back_whole(project: Project) -> None:
    """The second one would cost the quorum; what runs goes on as it was."""
    (project.folder / "after up -d n1").write_text(f"rm {shlex.quote(str(project.folder / 'n1' / 'healthz'))}")
    code, done, said = project.restart(*NODES)
    assert (1, restarted("n1")) == (code, done)
    assert REFUSED in said


def test_services_are_replaced_one_container_after_the_other(project: Project) -> None:
    """Made by compose and started without it: it would start what they depend on, or take the rest for changed."""
    made = ["up --no-start --no-recreate --scale ingest=2 ingest", "docker start ingest-1 ingest-2"]
    code, done, _ = project.restart("ingest")
    assert 0 == code
    assert ["docker stop --time 90 ingest-1", "docker rm ingest-1", *made] == done[:4]
    assert ["docker stop --time 90 ingest-2", "docker rm ingest-2", *made] == done[4:]


def test_a_host_without_a_node_has_nothing_to_ask(host: Project) -> None:
    """It has ingest and persisters, and the cluster is elsewhere."""
    code, done, _ = host.restart(nodes="")
    stopped = [line.split()[-1] for line in done if line.startswith("docker stop")]
    assert (0, ["persister-1", "persister-2", "ingest-1", "ingest-2"]) == (code, stopped)
