"""The compose files pass every setting: one that is in .env and not in the file would be ignored silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from services.core import tracing
from services.core.settings import variables
from services.ingest.settings import Settings
from services.log.settings import LogSettings
from services.persister.settings import PersisterSettings

DEPLOYMENT = Path(__file__).parents[3] / "deploy" / "nats-cluster"
#: what each process reads
READS: dict[str, tuple[type, ...]] = {
    "provision": (LogSettings,),
    # `fiq doctor` judges by what the others are told
    "ops": (LogSettings, Settings, PersisterSettings),
    "placement": (LogSettings, Settings, PersisterSettings),
    "ingest": (Settings,),
    "persister": (PersisterSettings,),
}
#: the image's own: addresses and ports within a container, and who comes in there shows a token
IN_THE_IMAGE = {
    "FI_HOST",
    "FI_PORT",
    "FI_MANAGEMENT_HOST",
    "FI_MANAGEMENT_PORT",
    "FI_PERSISTER_HOST",
    "FI_PERSISTER_PORT",
    "FI_ALLOW_ANONYMOUS",
    "FI_ALLOWED_HOSTS",
}
#: paths within a container, and that the services' users may not provision
MOUNTED = {"FI_NATS_CA_FILE", "FI_NATS_SEED_FILE", "FI_TOKEN_FILE", "FI_DATA_DIR", "FI_PROVISION"}
#: these files run nodes, so nothing in them reads the keys of the log without a broker
OTHER_LOG = {"FI_ZMQ_KEY_FILE", "FI_ZMQ_SERVER_KEY", "FI_ZMQ_CLIENT_KEYS"}
#: what a file decides besides: on one host the nodes are its own, and the balancer speaks TLS
DECIDED = {"compose.yaml": {"FI_LOG_URL", "FI_TLS_CERT", "FI_TLS_KEY"}, "compose.host.yaml": set[str]()}
#: what the command line reads
OF_COMMANDS = {"FI_URL"}
#: files that only ingest has
NOT_FOR = {name: {"FI_TLS_CERT", "FI_TLS_KEY"} for name in ("ops", "placement")}


def environment(file: str, service: str) -> dict[str, Any]:
    """Return the variables of *service*, as they stand in *file*."""
    services = yaml.safe_load((DEPLOYMENT / file).read_text(encoding="utf-8"))["services"]
    found: dict[str, Any] = services[service]["environment"]
    return found


@pytest.mark.parametrize("service", READS)
@pytest.mark.parametrize("file", DECIDED)
def test_each_setting_of_a_service_can_be_set_in_dotenv(file: str, service: str) -> None:
    """A name without a value is that of .env, or the default; `${NAME…}` is that with another default."""
    found = environment(file, service)
    read = {variable.name for settings in READS[service] for variable in variables(settings)}
    settable = read - IN_THE_IMAGE - MOUNTED - OTHER_LOG - DECIDED[file] - NOT_FOR.get(service, set())
    handed_on = {name for name, value in found.items() if value is None or f"${{{name}" in value}

    assert set() == settable - handed_on


@pytest.mark.parametrize("service", READS)
@pytest.mark.parametrize("file", DECIDED)
def test_each_variable_that_is_passed_is_a_setting(file: str, service: str) -> None:
    """A setting that was renamed or removed must go from here, too."""
    known = {variable.name for read in READS.values() for settings in read for variable in variables(settings)}

    assert set() == {name for name in environment(file, service) if name.startswith("FI_")} - known - OF_COMMANDS


@pytest.mark.parametrize("file", DECIDED)
def test_the_doctor_knows_the_users_of_the_containers(file: str) -> None:
    """Each that a service of the file runs as, with the same default."""
    services = yaml.safe_load((DEPLOYMENT / file).read_text(encoding="utf-8"))["services"]
    users = {str(one["user"]) for one in services.values() if "FIQ_" in str(one.get("user"))}

    assert users == {value for name, value in environment(file, "ops").items() if name.startswith("FIQ_")}


@pytest.mark.parametrize("service", ["ingest", "persister"])
@pytest.mark.parametrize("file", DECIDED)
def test_spans_can_be_asked_for_in_dotenv(file: str, service: str) -> None:
    """By the variables that docs/settings.md names, and those that say where to and how many."""
    names = {tracing.EXPORTER_VARIABLE, tracing.DISABLED_VARIABLE, *tracing.ENDPOINT_VARIABLES}
    found = environment(file, service)

    assert dict.fromkeys(names) == {name: found.get(name, "missing") for name in names}
