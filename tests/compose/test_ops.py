"""What operators run in containers of their own while the services run."""

from __future__ import annotations

import asyncio
import os

import orjson
import pytest
from typer.testing import CliRunner

from services.cli.demo import generate
from services.cli.init.files import ContainerRole, Layout
from services.cli.main import app
from tests.support.compose.engine import EngineError, docker
from tests.support.compose.stack import IMAGE, NODES, Deployment, inspect
from tests.support.polling import eventually_sync

#: prints which of its arguments can be read, files and folders
_READABLE = """
import os, sys
for path in sys.argv[1:]:
    try:
        os.listdir(path) if os.path.isdir(path) else open(path, "rb").close()
    except PermissionError:
        continue
    print(path)
"""

pytestmark = pytest.mark.timeout(300)


def test_the_doctor_sees_everything_and_finds_nothing(stack: Deployment) -> None:
    """As docs/operations.md has it: nothing stays unknown, although no monitoring port can be reached."""
    try:
        report = orjson.loads(stack("run", "--rm", "-T", "ops", "fiq", "doctor", "--json"))
    except EngineError as error:  # with what it found
        pytest.fail(str(error))
    findings = report["findings"]
    found = [one for one in findings if one["level"] != "ok"]
    if os.getuid() != 0:  # then `fiq init` cannot give each role a user of its own
        assert found.pop()["what"].startswith("containers share a user: ")
    assert [] == found
    looked_at = [one["check"] for one in findings if one["what"].startswith(NODES)]
    assert sorted(["clocks", "nodes", "sync_interval"] * len(NODES)) == sorted(looked_at)


def test_an_operator_lists_dead_letters_with_a_token(stack: Deployment) -> None:
    """As docs/runbook.md has it: the service is found without a URL; the first token may not, and is told so."""
    made = CliRunner().invoke(app, ["token", "new", "operator", "--scopes", "ops", "--deployment", str(stack.folder)])
    assert 0 == made.exit_code
    run = ("run", "--rm", "-T", "-e")

    def listed() -> str:
        return stack(*run, f"FI_TOKEN={made.stdout.strip()}", "ops", "fiq", "dead", "list", "--json")

    assert isinstance(orjson.loads(eventually_sync(listed)), list)
    with pytest.raises(EngineError, match="lacks the scope ops"):
        stack(*run, f"FI_TOKEN={stack.token}", "ops", "fiq", "dead", "list")


@pytest.mark.skipif(os.getuid() != 0, reason="only root's `fiq init` separates the roles")
async def test_a_role_cannot_read_what_another_one_has(stack: Deployment) -> None:
    """An intruder who leaves a container is its user on the host: without others' secrets, and without the corpus."""
    layout = Layout(stack.folder)
    services = {"n1": ContainerRole.NODES, "balancer": ContainerRole.BALANCER} | {
        role.value: role for role in (ContainerRole.INGEST, ContainerRole.PERSISTER)
    }
    users = {role: _user(stack, service) for service, role in services.items()}
    assert len(services) == len(set(users.values()))
    await stack.post(stack.load(), generate(20, seed=26))
    await stack.is_verified()

    paths = {
        layout.nats / "accounts.conf": ContainerRole.NODES,
        layout.node_key("n1"): ContainerRole.NODES,
        layout.tokens: ContainerRole.INGEST,
        layout.seed("ingest"): ContainerRole.INGEST,
        layout.seed("ops"): ContainerRole.PERSISTER,
        layout.balancer: ContainerRole.BALANCER,
        layout.token("default"): None,
        layout.seed("system"): None,
        layout.ca_key: None,
    }
    inside = {f"/run/{number}": role for number, role in enumerate(paths.values())} | {
        "/corpus": ContainerRole.PERSISTER,
        "/node": ContainerRole.NODES,
    }
    sources = [*paths, *(f"{stack.project}_{volume}" for volume in ("corpus", "n1"))]
    mounts = [f"-v{source}:{path}:ro" for source, path in zip(sources, inside, strict=True)]
    for role, user in users.items():
        command = ("run", "--rm", "--cap-drop=ALL", "--network=none", f"-u{user}", *mounts, IMAGE)
        seen = await asyncio.to_thread(docker, *command, "python3", "-c", _READABLE, *inside)
        assert {path for path, owner in inside.items() if owner is role} == set(seen.split()), role


def _user(stack: Deployment, service: str) -> str:
    """Return the user of the processes of *service*, as the kernel has it, and as the compose file says."""
    (user,) = {
        (str(inspect(one)["Config"]["User"]), docker("exec", one, "id", "-u").strip())
        for one in stack.containers(service)
    }
    assert user[0].partition(":")[0] == user[1]
    return user[0]
