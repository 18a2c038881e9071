"""The files that the embedded cluster's nats.conf includes: empty ones, or those of a deployment."""

from __future__ import annotations

from pathlib import Path

from services.cli.embedded.processes import Cluster
from services.cli.init.deployment import Deployment
from services.cli.init.files import NATS_FILES, FileOwner


def included(folder: Path) -> dict[str, str]:
    """Return what nats.conf in *folder* includes, without comments."""
    lines = {name: (folder / "security" / name).read_text().splitlines() for name in NATS_FILES}
    return {name: "\n".join(line for line in text if not line.startswith("#")).strip() for name, text in lines.items()}


def test_without_security_the_files_are_there_and_empty(tmp_path: Path) -> None:
    """An include of a file that is missing would end the node."""
    Cluster(tmp_path).write_configuration()

    assert dict.fromkeys(NATS_FILES, "") == included(tmp_path)


def test_with_security_they_are_the_deployments_own(tmp_path: Path) -> None:
    """Not copies: what is renewed there is what a reload reads."""
    deployment = Deployment(tmp_path / "deployment", FileOwner.myself())
    deployment.complete()
    Cluster(tmp_path / "cluster", security=tmp_path / "deployment").write_configuration()

    accounts = tmp_path / "cluster/security/accounts.conf"
    assert deployment.layout.nats / "accounts.conf" == accounts.resolve()
    deployment.begin_users()
    assert 2 * 6 == accounts.read_text().count("nkey: U")


def test_a_folder_can_change_from_one_to_the_other(tmp_path: Path) -> None:
    """The deployment's files stay as they are."""
    deployment = Deployment(tmp_path / "deployment", FileOwner.myself())
    deployment.complete()
    before = (deployment.layout.nats / "accounts.conf").read_text()

    for security in (None, tmp_path / "deployment", None):
        Cluster(tmp_path / "cluster", security=security).write_configuration()
        assert (security is None) == ("" == included(tmp_path / "cluster")["accounts.conf"])

    assert before == (deployment.layout.nats / "accounts.conf").read_text()
