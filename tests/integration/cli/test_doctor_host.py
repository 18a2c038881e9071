"""`fiq doctor` on this machine: each thing is broken for real where that is possible, and found."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
from typer.testing import CliRunner

from fiq.corpus.wal import storage
from services.cli.doctor import host
from services.cli.embedded.processes import LOOPBACK, free_ports
from services.cli.init.files import ContainerRole, Layout
from services.cli.main import app
from services.log.findings import Level
from services.persister.settings import PersisterSettings
from tests.support.broker import plain_server
from tests.support.findings import fine, only
from tests.support.polling import eventually_sync
from tests.support.small_disk import fill, small_disk

#: folders of tests may be in memory
SETTINGS = PersisterSettings(allow_ephemeral=True)


@pytest.fixture
def directory() -> Iterator[Path]:
    """A data directory that others can get to: pytest's own folders are closed to them."""
    made = Path(tempfile.mkdtemp())
    made.chmod(0o755)
    data = made / "data"
    data.mkdir(mode=0o750)
    yield data
    shutil.rmtree(made)


# -- the machine ------------------------------------------------------------------------------------------------------


def test_this_machine_has_the_versions_that_fiq_needs() -> None:
    """It was installed with its requirements; the finding names them all."""
    (finding,) = host.check_versions()
    assert Level.OK is finding.level
    for part in ("fiq ", "Python 3.", "h5py 3.", "HDF5 ", "nats-py 2."):
        assert part in finding.what


@pytest.mark.parametrize(("python", "h5"), [((3, 10), "3.14.0"), ((3, 11), "3.9.1")])
def test_versions_that_are_too_old_are_errors(python: tuple[int, ...], h5: str) -> None:
    """Neither can be installed here any more."""
    assert "or newer" in only(host.check_versions(python, h5), Level.ERROR).meaning


def test_few_descriptors_are_a_warning() -> None:
    """The soft limit of this very process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        assert "512 files" in only(host.check_open_files(), Level.WARNING).what
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_little_memory_for_the_settings_is_an_error() -> None:
    """The kernel would end the persister again and again."""
    fine(host.check_memory(PersisterSettings()))
    assert "FI_BUFFER_BYTES" in only(host.check_memory(PersisterSettings(), 128 << 20), Level.ERROR).action
    assert only(host.check_memory(PersisterSettings(buffer_bytes=2**32), 4 << 30), Level.ERROR).meaning


@pytest.mark.parametrize("variable", ["FI_NATS_SEED_FILE", "FI_TOKEN_FILE", "FI_TLS_KEY", "FI_ZMQ_KEY_FILE"])
def test_a_secret_that_others_can_read_is_an_error(tmp_path: Path, variable: str) -> None:
    """One for its owner only is fine, a missing one is an error."""
    seed = tmp_path / "secret"
    env = {variable: str(seed)}
    assert "No such file" in only(host.check_secrets(env), Level.ERROR).what
    seed.write_text("SU…")
    seed.chmod(0o640)
    assert "chmod 600" in only(host.check_secrets(env), Level.ERROR).action
    seed.chmod(0o600)
    fine(host.check_secrets(env))
    assert [] == list(host.check_secrets({}))


def test_roles_that_share_a_user_are_a_warning() -> None:
    """The container `ops` has the users of all; a common group is fine, and on several hosts some are absent."""
    env = {role.variable: f"{10001 + number}:10001" for number, role in enumerate(ContainerRole)}
    fine(host.check_users(env))
    fine(host.check_users({name: env[name] for name in list(env)[:3]}))
    shared = env | {ContainerRole.NODES.variable: "1000:1000", ContainerRole.INGEST.variable: "1000:2000"}
    finding = only(host.check_users(shared), Level.WARNING)
    assert "containers share a user: nodes, ingest as 1000" == finding.what
    assert "docs/security.md" in finding.action
    assert [] == list(host.check_users({}))


def test_outside_a_container_the_deployments_own_file_says_whether_roles_share_a_user(tmp_path: Path) -> None:
    """It is found by the seed that the variables name; elsewhere no users are known."""
    seed = Layout(tmp_path).seed("ops")
    env = {"FI_NATS_SEED_FILE": str(seed)}
    assert [] == list(host.check_users(env))
    dotenv = tmp_path / ".env"
    dotenv.write_text("FIQ_SECRETS=./secrets\n")  # the compose files' defaults
    fine(host.check_users(env))
    dotenv.write_text("".join(f"{role.variable}=1000:1000\n" for role in ContainerRole))
    assert "as 1000" in only(host.check_users(env), Level.WARNING).what
    dotenv.write_text("FIQ_INGEST_USER=ingest\n")
    assert "give numbers" in only(host.check_users(env), Level.UNKNOWN).what
    assert [] == list(host.check_users({"FI_NATS_SEED_FILE": "user.seed"}))


def test_a_data_directory_that_every_user_can_read_is_an_error(directory: Path) -> None:
    """Also where only a file is open; not where a folder above is closed."""
    fine(host.check_directory(directory, SETTINGS))
    (directory / "00.h5").write_bytes(b"")
    (directory / "00.h5").chmod(0o644)
    assert "chmod -R o-rwx" in only(host.check_directory(directory, SETTINGS), Level.ERROR).action
    directory.parent.chmod(0o700)
    fine(host.check_directory(directory, SETTINGS))
    directory.parent.chmod(0o755)
    (directory / "00.h5").chmod(0o640)
    directory.chmod(0o755)
    assert str(directory) in only(host.check_directory(directory, SETTINGS), Level.ERROR).what


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    """And so is one that cannot be written at all; the probe removes its file."""
    with small_disk("tmpfs", tmp_path / "disk", size=8) as disk:
        fine(host.check_directory(disk, SETTINGS))
        ballast = fill(disk)
        found = [finding for finding in host.check_directory(disk, SETTINGS) if finding.level is Level.ERROR]
        assert ["disks", "disks"] == [finding.check for finding in found]
        assert "cannot be written: No space left" in found[1].what
        ballast.unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        found = [finding for finding in host.check_directory(disk, SETTINGS) if finding.level is Level.ERROR]
        assert ["permissions", "disks"] == [finding.check for finding in found]
        assert [] == list(disk.iterdir())


def test_a_disk_with_less_free_than_the_reserve_is_an_error(tmp_path: Path) -> None:
    """Persisters write nothing then; twice the reserve is a warning."""
    with small_disk("tmpfs", tmp_path / "disk", size=8) as disk:
        only(host.check_directory(disk, PersisterSettings(allow_ephemeral=True, disk_reserve=60)), Level.WARNING)
        (disk / "ballast").write_bytes(bytes(4 << 20))
        found = host.check_directory(disk, PersisterSettings(allow_ephemeral=True, disk_reserve=60))
        assert "FI_DISK_RESERVE (60 %)" in only(found, Level.ERROR).meaning


def test_a_data_directory_in_memory_is_an_error(tmp_path: Path) -> None:
    """Unless the setting allows it, as `fiq up` does."""
    with small_disk("tmpfs", tmp_path / "disk", size=8) as disk:
        finding = only(host.check_directory(disk, PersisterSettings()), Level.ERROR)
        assert f"{disk} is on tmpfs" == finding.what
        assert "FI_DATA_DIR" in finding.action
        fine(host.check_directory(disk, SETTINGS))


def test_a_remote_file_system_is_an_error(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None can be mounted here, so the system's answer is replaced."""
    monkeypatch.setattr(storage, "_file_system_type", lambda _: 0x6969)
    assert "NFS" in only(host.check_directory(directory, SETTINGS), Level.ERROR).what


def test_a_lock_that_does_not_exclude_is_an_error(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some network file systems that do not say what they are."""
    monkeypatch.setattr(host, "_is_excluded", lambda _: False)
    assert "two writers" in only(host.check_directory(directory, SETTINGS), Level.ERROR).meaning


# -- the command ------------------------------------------------------------------------------------------------------


def test_a_cluster_out_of_reach_is_a_finding_and_the_rest_is_still_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As JSON, with exit code 1."""
    monkeypatch.chdir(tmp_path)
    server = f"nats://{LOOPBACK}:{free_ports(1)[0]}"
    done = CliRunner().invoke(app, ["doctor", "--json", "--server", server])
    assert 1 == done.exit_code
    report = orjson.loads(done.stdout)
    assert "error" == report["worst"]
    levels = {(finding["check"], finding["level"]) for finding in report["findings"]}
    assert {("nodes", "error"), ("versions", "ok"), ("corpus", "unknown")} <= levels


def test_where_nothing_runs_the_command_says_so_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It examines no port that nothing has named."""
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["doctor"])
    assert (1, "") == (done.exit_code, done.stdout)
    (line,) = done.stderr.splitlines()
    assert "no `fiq up` is running in" in line
    assert line.endswith("start it, or name the folder of one with --folder, or a cluster with --server")


def test_nodes_that_do_not_answer_are_one_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems come first, and no advice is about users of a cluster that is not there; --all shows what is fine."""
    monkeypatch.chdir(tmp_path)
    ports = free_ports(2)
    server = ",".join(f"nats://{LOOPBACK}:{port}" for port in ports)
    done = CliRunner().invoke(app, ["doctor", "--server", server])
    lines = done.stdout.splitlines()
    assert 1 == done.exit_code
    both = ", ".join(f"{LOOPBACK}:{port}" for port in sorted(ports))
    assert f"error    nodes         no NATS node answers at {both}" == lines[0]
    assert not any(line.startswith("ok ") for line in lines)
    assert lines[-1].startswith("1 error, 1 unknown, ") or lines[-1].startswith("1 error, 1 warning, 1 unknown, ")
    assert lines[-1].endswith(" checks passed (--all shows them)")
    assert "ops" not in done.stdout

    everything = CliRunner().invoke(app, ["doctor", "--server", server, "--all"])
    shown = [line.split()[0] for line in everything.stdout.splitlines()[:-1] if not line.startswith(" ")]
    assert shown == sorted(shown, key=["error", "warning", "unknown", "ok"].index)
    assert "ok" in shown


def permissions(folder: Path, denied: str) -> list[dict[str, str]]:
    """Return what doctor finds of permissions, as a user who may not publish on *denied*."""
    user = f'{{ user: a, password: b, permissions: {{ publish: {{ deny: "{denied}" }} }} }}'
    jetstream = f'jetstream {{ store_dir: "{folder}/js" }}'
    with plain_server(folder, f"{jetstream}\nauthorization {{ users: [ {user} ] }}") as url:
        command = [sys.executable, "-m", "services.cli.main", "doctor", "--json", "--server"]
        done = subprocess.run(
            [*command, url.replace("//", "//a:b@")],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert 1 == done.returncode
    assert "a:b" not in done.stdout + done.stderr
    return [one for one in orjson.loads(done.stdout)["findings"] if one["check"] == "permissions"]


def test_a_user_that_may_not_ask_is_an_error(tmp_path: Path) -> None:
    """The request runs into its timeout, and only the connection's error callback knows why."""
    (finding,) = permissions(tmp_path, "$JS.API.>")
    assert ("error", True) == (finding["level"], "this user may not ask" in finding["what"])
    assert "`ops`" in finding["action"]


def test_accounts_of_before_are_a_warning_that_says_how_to_renew_them(tmp_path: Path) -> None:
    """`ops` may not ask the nodes then, and their monitoring ports are out of reach."""
    (finding,) = permissions(tmp_path, "fi.nodes.>")
    assert ("warning", True) == (finding["level"], "accounts are those of an older fiq" in finding["what"])
    assert "`fiq init FOLDER`, and reload the nodes" in finding["action"]


def test_a_reader_that_holds_a_file_is_named(tmp_path: Path) -> None:
    """By its process id, as the kernel's list of locks has it; the writer is none."""
    file, journal = tmp_path / "00.h5", tmp_path / "00.h5.wal"
    file.write_bytes(b"")
    journal.write_bytes(b"")
    assert [] == host.readers(file)
    program = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_SH); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program, str(file)], stdin=subprocess.PIPE) as holder:
        eventually_sync(lambda: host.readers(file) == [holder.pid])
        holder.kill()
