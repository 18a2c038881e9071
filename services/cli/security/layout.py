"""Where things are in a deployment's folder; what stands in ``docs/security.md``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

#: what nats.conf includes from the folder ``security`` beside it
NATS_FILES = ("accounts.conf", "at-rest.conf", "client-tls.conf", "route-tls.conf")

_NODE = re.compile(r"n([1-9][0-9]?)\.pem", re.ASCII)


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths of the folder that ``fiq init`` makes."""

    folder: Path

    @property
    def environment(self) -> Path:
        """Variables for compose; no secret among them."""
        return self.folder / ".env"

    @property
    def secrets(self) -> Path:
        """Everything that nobody else may read."""
        return self.folder / "secrets"

    @property
    def folders(self) -> tuple[Path, ...]:
        """Everything in it that is a folder."""
        return self.nodes, self.users, self.nats, self.api, self.balancer, self.clients

    @property
    def ignore(self) -> Path:
        """Keeps git away from the secrets."""
        return self.secrets / ".gitignore"

    @property
    def ca_certificate(self) -> Path:
        """What everybody trusts."""
        return self.secrets / "ca.pem"

    @property
    def ca_key(self) -> Path:
        """What makes certificates; for the operator only, no process ever needs it."""
        return self.secrets / "ca.key"

    @property
    def nodes(self) -> Path:
        """Folder of the nodes' certificates and keys."""
        return self.secrets / "nodes"

    @property
    def users(self) -> Path:
        """Folder of the users' seeds."""
        return self.secrets / "users"

    @property
    def nats(self) -> Path:
        """Folder of the files that nats.conf includes."""
        return self.secrets / "nats"

    @property
    def clients(self) -> Path:
        """Folder of the API tokens as clients send them."""
        return self.secrets / "clients"

    @property
    def api(self) -> Path:
        """Folder of what ingest needs for its clients; mounted as a whole, so that its files can be replaced."""
        return self.secrets / "api"

    @property
    def tokens(self) -> Path:
        """The API tokens as the ingest service knows them: hashes."""
        return self.api / "tokens"

    @property
    def balancer(self) -> Path:
        """Folder of the certificate that compose.yaml's balancer shows to clients, if the operator puts one there."""
        return self.secrets / "balancer"

    @property
    def grafana_password(self) -> Path:
        """The first password of Grafana's user admin."""
        return self.secrets / "grafana.password"

    def node_certificate(self, node: str) -> Path:
        """Return the certificate of *node*."""
        return self.nodes / f"{node}.pem"

    def node_key(self, node: str) -> Path:
        """Return the private key of *node*."""
        return self.nodes / f"{node}.key"

    def seed(self, user: str) -> Path:
        """Return the nkey seed of *user*."""
        return self.users / f"{user}.seed"

    def next_seed(self, user: str) -> Path:
        """Return the seed that *user* will have when the rotation that is under way is finished."""
        return self.users / f"{user}.seed.next"

    def token(self, name: str) -> Path:
        """Return the API token called *name*."""
        return self.clients / f"{name}.token"

    def known_nodes(self) -> list[str]:
        """Return the names of the nodes that have a certificate, in order."""
        found = (_NODE.fullmatch(path.name) for path in self.nodes.glob("n*.pem"))
        return [f"n{number}" for number in sorted(int(match[1]) for match in found if match)]
