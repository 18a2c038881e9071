"""The `.env` of a deployment: what compose needs to know, and no secret."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from services.cli.security.files import Owner

_TEXT = """\
# Made by `fiq init`, yours from now on: it is never written again. Compose reads it from the folder of compose.yaml.
# What is commented out shows its default.

# the secrets; a relative path begins at the folder of compose.yaml
FIQ_SECRETS=./secrets
# whom the secrets belong to, and so whom the containers run as
FIQ_UID={uid}
FIQ_GID={gid}

# the log: see docs/settings.md; alike for every process of the deployment
#FI_PARTITIONS=16
#FI_REPLICAS=3
#FI_STREAM_MAX_BYTES=4GiB
#FI_STORE=main
#FI_VOLUMES=1
#FI_RETENTION=24h
# and every other of docs/settings.md
"""

_HOSTS = """
# the machines, one node each: alike on all of them
FI_NATS_URL={url}
NODE_ROUTES={routes}
# and what differs: which one this is
{nodes}
"""


def dotenv(owner: Owner, hosts: Mapping[str, str]) -> str:
    """Return its text.

    Args:
        owner: of the secrets.
        hosts: node -> the machine's name or address; empty when everything runs on one machine.
    """
    text = _TEXT.format(uid=owner.uid, gid=owner.gid)
    if not hosts:
        return text
    return text + _HOSTS.format(
        nodes="\n".join(f"#NODE_NAME={node}\n#NODE_HOST={host}" for node, host in hosts.items()),
        url=",".join(_url(host, 4222) for host in hosts.values()),
        routes=_list([_url(host, 6222) for host in hosts.values()]),
    )


def _url(host: str, port: int) -> str:
    return f"nats://[{host}]:{port}" if ":" in host else f"nats://{host}:{port}"


def _list(urls: Sequence[str]) -> str:
    return "'[" + ", ".join(f'"{url}"' for url in urls) + "]'"
