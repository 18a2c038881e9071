"""nats-server accepts the configuration that compose and the embedded cluster use."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from services.cli.embedded.processes import find_nats_conf, find_nats_server
from services.cli.init.files import NATS_FILES, Layout
from tests.support.security import make_deployment


def configuration(folder: Path, layout: Layout | None) -> Path:
    """Return nats.conf with the files that it includes: empty ones, or those of a deployment."""
    conf = folder / "nats.conf"
    conf.write_bytes(find_nats_conf().read_bytes())
    (folder / "security").mkdir()
    for name in NATS_FILES:
        (folder / "security" / name).write_bytes(b"" if layout is None else (layout.nats / name).read_bytes())
    return conf


@pytest.mark.parametrize("secured", [False, True], ids=["loopback", "secured"])
@pytest.mark.parametrize(
    ("cluster_listen", "routes"),
    [("0.0.0.0:6222", '["nats://n1:6222", "nats://n2:6222", "nats://n3:6222"]'), ("127.0.0.1:0", "[]")],
    ids=["cluster", "single node"],
)
def test_nats_server_accepts_the_configuration(
    tmp_path: Path, cluster_listen: str, routes: str, *, secured: bool
) -> None:
    """With values as compose and the embedded cluster give them, with a deployment's files and without."""
    layout = make_deployment(tmp_path / "deployment", encrypt=True) if secured else None
    env = {
        "NODE_NAME": "n1",
        "NODE_TAGS": "az:1",
        "NODE_LISTEN": "0.0.0.0:4222",
        "NODE_ADVERTISE": "127.0.0.1:4222",
        "NODE_HTTP": "127.0.0.1:8222",
        "NODE_CLUSTER_NAME": "fiq",
        "NODE_CLUSTER_LISTEN": cluster_listen,
        "NODE_CLUSTER_ADVERTISE": "n1:6222",
        "NODE_ROUTES": routes,
        "NODE_STORE_DIR": f'"{tmp_path} with a space"',
        "NODE_MAX_FILE_STORE": "6GB",
    }
    if layout is not None:
        certificate, key = layout.node_certificate("n1"), layout.node_key("n1")
        env |= {"NODE_CERT": str(certificate), "NODE_KEY": str(key), "NODE_CA": str(layout.ca_certificate)}

    conf = configuration(tmp_path, layout)
    result = subprocess.run(
        [find_nats_server(), "-t", "-c", conf], env=env, capture_output=True, text=True, check=False
    )

    assert result.returncode == 0, result.stderr


def test_an_unset_variable_is_refused_by_nats_server(tmp_path: Path) -> None:
    """No node comes up with half of its values: the format has no defaults."""
    conf = configuration(tmp_path, None)
    result = subprocess.run([find_nats_server(), "-t", "-c", conf], env={}, capture_output=True, text=True, check=False)

    assert result.returncode == 1
    assert "NODE_NAME" in result.stderr
