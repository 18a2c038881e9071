"""FI_LOG_URL of a log without a broker, its keys, and what a volume's files say of its partitions."""

from __future__ import annotations

from pathlib import Path

import pytest

from fiq.errors import ConfigurationError
from services.core.settings import load
from services.log.errors import PlacementError
from services.log.settings import FORMED_FILE, LogSettings
from services.log.zeromq.log import VolumePlacements
from services.log.zeromq.sockets import Address, read_keys


def settings(url: str, **others: str) -> LogSettings:
    return load(LogSettings, {"FI_LOG_URL": url, "FI_PARTITIONS": "4", **others})


def test_each_partition_has_a_socket_or_a_port_of_its_own() -> None:
    """Named after the store, or counted from the port."""
    assert "ipc:///run/fiq/main-03" == Address("zmq+ipc:///run/fiq", "main").endpoint(3)
    assert "tcp://h:7603" == Address("zmq+tcp://h:7600", "main").endpoint(3)
    assert "tcp://[::1]:7603" == Address("zmq+tcp://[::1]:7600", "main").endpoint(3)


@pytest.mark.parametrize("url", ["zmq+tcp://host", "zmq+tcp://:1", f"zmq+ipc:///{'x' * 100}"])
def test_an_address_that_cannot_be_used_is_refused(url: str) -> None:
    """At once, with the setting's name."""
    with pytest.raises(ConfigurationError, match="FI_LOG_URL"):
        Address(url, "main")


@pytest.mark.parametrize("url", ["zmq+ipc://relative", "zmq+inproc://x", "zmq+ipc:///a,zmq+ipc:///b", "http://h"])
def test_a_setting_that_is_no_log_is_refused(url: str) -> None:
    """There is one address; NATS alone has several."""
    with pytest.raises(ConfigurationError, match="zmq\\+ipc:///DIRECTORY"):
        settings(url)


def test_unix_sockets_need_no_keys_and_tcp_cannot_do_without(tmp_path: Path) -> None:
    """The error names the settings and the command that makes the keys."""
    assert read_keys(settings("zmq+ipc:///run/fiq"), owner=True) is None
    with pytest.raises(ConfigurationError, match=r"FI_ZMQ_KEY_FILE is not set.*FI_ZMQ_CLIENT_KEYS.*fiq init"):
        read_keys(settings("zmq+tcp://h:1"), owner=True)
    with pytest.raises(ConfigurationError, match="FI_ZMQ_SERVER_KEY"):
        read_keys(settings("zmq+tcp://h:1"), owner=False)
    (tmp_path / "k").write_text("nothing")
    own = {"FI_ZMQ_KEY_FILE": str(tmp_path / "k"), "FI_ZMQ_SERVER_KEY": str(tmp_path / "k")}
    with pytest.raises(ConfigurationError, match=r"FI_ZMQ_KEY_FILE=.* cannot be read"):
        read_keys(settings("zmq+tcp://h:1", **own), owner=False)


async def test_a_volume_has_the_partitions_whose_files_were_made(tmp_path: Path) -> None:
    """All of them once they were all made: then a missing file is a lost one."""
    placements = VolumePlacements(tmp_path, "v-1", settings("zmq+ipc:///run/fiq"))
    assert {} == dict((await placements.read()).partitions)
    (tmp_path / "02.h5").touch()
    seen = await placements.read()
    assert (False, {2}) == (seen.formed, set(seen.partitions))
    await placements.form({"v-1"})
    seen = await placements.read()
    assert (True, {0, 1, 2, 3}, ("v-1",)) == (seen.formed, set(seen.partitions), seen.volumes)


async def test_a_volume_of_another_number_of_partitions_is_refused(tmp_path: Path) -> None:
    """Consultations would be looked for in the wrong files."""
    await VolumePlacements(tmp_path, "v-1", settings("zmq+ipc:///run/fiq")).form({"v-1"})
    other = VolumePlacements(tmp_path, "v-1", settings("zmq+ipc:///run/fiq", FI_PARTITIONS="8"))
    with pytest.raises(PlacementError, match="FI_PARTITIONS=4"):
        await other.read()
    (tmp_path / FORMED_FILE).write_text("{")
    with pytest.raises(PlacementError, match="cannot be read"):
        await other.read()


@pytest.mark.parametrize("url", ["nats://", "nats://n1:99999", "nats://n1:port", "nats://n1:0", "tls://n1,nats://[::1"])
def test_a_node_without_a_host_or_with_no_port_is_refused(url: str) -> None:
    """Before a client of NATS stumbles over it."""
    with pytest.raises(ConfigurationError, match="expected nats://HOST:PORT"):
        settings(url)
    assert ("nats://a:b@[::1]", "tls://n1:4222") == settings("nats://a:b@[::1], tls://n1:4222").servers
