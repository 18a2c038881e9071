"""`fiq init`: the secrets of a deployment, made once, for their owner alone, and renewed on demand."""

from __future__ import annotations

import hashlib
import os
import re
import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from typer.testing import CliRunner

from services.cli.init import deployment
from services.cli.init.deployment import USERS
from services.cli.init.files import NATS_FILES, Layout, Secrets
from services.cli.init.keys import NODE_LIFETIME, names_in
from services.cli.main import app
from services.log.jetstream.connection import Role, public_key

#: what a deployment of three nodes has in `secrets`
FILES = {
    ".gitignore",
    "ca.key",
    "ca.pem",
    "clients/default.token",
    "api/tokens",
    "grafana.password",
    *(f"nats/{name}" for name in NATS_FILES),
    *(f"nodes/n{number}.{kind}" for number in (1, 2, 3) for kind in ("pem", "key")),
    *(f"users/{user}.seed" for user in ("ingest", "persister", "provisioner", "ops", "placement", "system")),
}

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files to another user")


def init(folder: Path, *arguments: str, owner: str = "") -> Any:
    """Run the command, as the owner of what it makes unless another one is named."""
    whom = owner or f"{os.geteuid()}:{os.getegid()}"
    return CliRunner().invoke(app, ["init", str(folder), "--owner", whom, *arguments])


def made(folder: Path, *arguments: str) -> Layout:
    """Run it, and return where things are."""
    done = init(folder, *arguments)
    assert done.exit_code == 0, done.output
    return Layout(folder)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below *folder* by its name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_makes_everything_that_a_deployment_needs(tmp_path: Path) -> None:
    """Authority, three nodes, five users, an API token, a password, what nats-server reads, variables for compose."""
    layout = made(tmp_path / "deployment")

    assert FILES == set(contents(layout.secrets))
    assert {".env", "secrets"} == {path.name for path in layout.folder.iterdir()}


def test_only_the_owner_may_read_any_of_it(tmp_path: Path) -> None:
    """Files 0600, folders 0700, whatever the umask says; only the authority's certificate is public."""
    before = os.umask(0)
    try:
        layout = made(tmp_path / "deployment")
    finally:
        os.umask(before)

    for path in (layout.folder, *layout.folder.rglob("*")):
        wanted = 0o700 if path.is_dir() else 0o644 if path == layout.ca_certificate else 0o600
        assert wanted == stat.S_IMODE(path.stat().st_mode), path


#: what containers of each role must read; the rest is the operator's
MOUNTED = {
    "NODES": {"nats", *(f"nats/{name}" for name in NATS_FILES), "users/provisioner.seed"}
    | {f"nodes/n{number}.{kind}" for number in (1, 2, 3) for kind in ("pem", "key")},
    "INGEST": {"api", "api/tokens", "users/ingest.seed"},
    "PERSISTER": {f"users/{user}.seed" for user in ("persister", "ops", "placement")},
    "BALANCER": {"balancer"},
    "GRAFANA": {"grafana.password"},
}
ROTATIONS = [(), ("--rotate", "certificates"), ("--rotate", "users")]


def plain_init(folder: Path, *arguments: str) -> str:
    """Run the command without --owner; return its output."""
    done = CliRunner().invoke(app, ["init", str(folder), *arguments])
    assert done.exit_code == 0, done.output
    return str(done.output)


def users_in(layout: Layout) -> dict[str, int]:
    """Return the users of the roles, as compose reads them."""
    found = re.findall(r"^FIQ_(\w+)_USER=(\d+):\2$", layout.environment.read_text(), re.MULTILINE)
    return {role: int(uid) for role, uid in found}


def owners(layout: Layout) -> dict[str, int]:
    """Return the owner of everything in the folder of secrets."""
    return {str(path.relative_to(layout.secrets)): path.stat().st_uid for path in layout.secrets.rglob("*")}


def wanted_owners(layout: Layout, users: dict[str, int], operator: int) -> dict[str, int]:
    """Return whom everything there must belong to."""
    mounted = {name: users[role] for role, names in MOUNTED.items() for name in names}
    next_seeds = {f"{name}.next": user for name, user in mounted.items() if name.endswith(".seed")}
    return {name: (mounted | next_seeds).get(name, operator) for name in owners(layout)}


@as_root
def test_root_gives_each_secret_to_the_containers_that_mount_it(tmp_path: Path) -> None:
    """Each role is another user; what no container needs stays the operator's, who owns the deployment's folder."""
    os.chown(tmp_path, 1000, 1000)

    output = plain_init(tmp_path)

    layout = Layout(tmp_path)
    users = users_in(layout)
    assert MOUNTED.keys() == users.keys()
    assert len(MOUNTED) == len({*users.values(), 0, 1000} - {0, 1000})
    assert wanted_owners(layout, users, 1000) == owners(layout)
    assert {1000} == {path.stat().st_uid for path in (layout.secrets, layout.environment)}
    assert "note:" not in output


@as_root
@pytest.mark.parametrize("arguments", ROTATIONS)
def test_owners_survive_a_renewal(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """New files get the owner of their role, renewed ones keep theirs."""
    plain_init(tmp_path)
    layout = Layout(tmp_path)

    output = plain_init(tmp_path, *arguments)
    if "users" in arguments:
        assert wanted_owners(layout, users_in(layout), 0) == owners(layout)
        output += plain_init(tmp_path, "--rotate", "users-finish")

    assert "gave" not in output
    assert wanted_owners(layout, users_in(layout), 0) == owners(layout)


def test_an_ordinary_user_runs_everything_and_is_told_how_to_separate_the_roles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only root can give files away. A second run does not repeat it."""
    uid = os.geteuid() or 1234
    os.chown(tmp_path, uid, -1)
    monkeypatch.setattr(os, "geteuid", lambda: uid)

    (note,) = re.findall("^note: .*$", plain_init(tmp_path), re.MULTILINE)

    layout = Layout(tmp_path)
    assert f"all containers run as {uid}:{os.getegid()}" in note
    assert {uid} == {*owners(layout).values(), layout.environment.stat().st_uid}
    assert f"FIQ_INGEST_USER={uid}:{os.getegid()}\n" in layout.environment.read_text()
    assert "note:" not in plain_init(tmp_path)


def test_the_seed_of_every_nats_user_is_some_containers_or_the_operators(tmp_path: Path) -> None:
    """The system account's alone is in no container."""
    layout = Layout(tmp_path)
    assert ["system"] == [user for user in USERS if layout.container_of(layout.seed(user)) is None]


@as_root
def test_an_owner_can_be_named(tmp_path: Path) -> None:
    """By number, with a group or without."""
    assert init(tmp_path / "deployment", owner="1234:5678").exit_code == 0

    found = Layout(tmp_path / "deployment").seed("ops").stat()
    assert (1234, 5678) == (found.st_uid, found.st_gid)


@as_root
@pytest.mark.parametrize("arguments", ROTATIONS)
@pytest.mark.parametrize("lost", [False, True], ids=["with .env", "without .env"])
def test_root_leaves_secrets_to_the_user_who_has_them(tmp_path: Path, arguments: tuple[str, ...], lost: bool) -> None:
    """Nodes and services run as that user, and could not read another user's files."""
    layout = Layout(tmp_path / "deployment")
    assert init(layout.folder, owner="1234:5678").exit_code == 0
    for path in (layout.folder, *layout.folder.rglob("*")):
        os.chown(path, 1234, 5678)
    if lost:
        layout.environment.unlink()

    output = plain_init(layout.folder, *arguments)

    assert "gave" not in output
    assert {(1234, 5678)} == {(found.st_uid, found.st_gid) for found in map(os.stat, layout.folder.rglob("*"))}


@as_root
@pytest.mark.parametrize("value", ["1234:5678", '"1234:5678" # ours', "9:9\nFIQ_INGEST_USER = 1234:5678"])
def test_another_user_can_be_set_later(tmp_path: Path, value: str) -> None:
    """In .env, which compose reads, too; only then do secrets change hands, and the output says so."""
    plain_init(tmp_path)
    layout = Layout(tmp_path)
    before = owners(layout)
    text = layout.environment.read_text()
    layout.environment.write_text(re.sub("(FIQ_INGEST_USER=).*", lambda found: found[1] + value, text))

    output = plain_init(tmp_path)

    changed = {"api", "api/tokens", "users/ingest.seed"}
    assert {f"gave {layout.secrets / name} to 1234:5678" for name in changed} == set(output.splitlines())
    assert before | dict.fromkeys(changed, 1234) == owners(layout)


@as_root
def test_a_role_without_a_user_in_dotenv_has_that_of_the_compose_file(tmp_path: Path) -> None:
    """An empty line means the default there, too."""
    plain_init(tmp_path)
    layout = Layout(tmp_path)
    before = owners(layout)
    text = layout.environment.read_text()
    layout.environment.write_text(re.sub("FIQ_NODES_USER=.*\n", "", re.sub("(FIQ_INGEST_USER=).*", r"\1", text)))

    assert "nothing was changed" in plain_init(tmp_path)
    assert before == owners(layout)


@pytest.mark.parametrize(
    ("line", "owner", "problem"),
    [
        ("FIQ_INGEST_USER=ingest", "", "FIQ_INGEST_USER=ingest: give numbers"),
        ("FIQ_INGEST_USER=1234", "77", "has FIQ_INGEST_USER=1234:1234: change it there, and leave --owner out"),
    ],
)
def test_users_that_are_unclear_are_refused(tmp_path: Path, line: str, owner: str, problem: str) -> None:
    """Before any file changes hands."""
    layout = made(tmp_path)
    layout.environment.write_text(f"{line}\n")
    before = owners(layout)
    for role in ("NODES", "PERSISTER", "BALANCER", "GRAFANA"):
        with layout.environment.open("a") as file:
            file.write(f"FIQ_{role}_USER=77\n")

    done = CliRunner().invoke(app, ["init", str(tmp_path), *(("--owner", owner) if owner else ())])

    assert 1 == done.exit_code
    assert problem in done.output
    assert before == owners(layout)


def test_a_second_run_changes_nothing_and_says_so(tmp_path: Path) -> None:
    """It may stand in a script."""
    layout = made(tmp_path)
    before = contents(tmp_path)

    done = init(tmp_path)

    assert f"{tmp_path}: nothing is missing, nothing was changed\n" == done.output
    assert before == contents(layout.folder)


@pytest.mark.parametrize("lost", ["users/ops.seed", "nats/accounts.conf", "api/tokens", "grafana.password"])
def test_what_is_missing_is_made_again_and_the_rest_stays(tmp_path: Path, lost: str) -> None:
    """Of seeds a new one, which accounts.conf then has; derived files as they were."""
    layout = made(tmp_path)
    before = contents(layout.secrets)
    (layout.secrets / lost).unlink()

    done = init(tmp_path)

    after = contents(layout.secrets)
    follows = {"users/ops.seed": {"nats/accounts.conf"}, "api/tokens": {"clients/default.token"}}.get(lost, set())
    assert f"made {layout.secrets / lost}" in done.output
    assert {lost, *follows} >= {name for name in after if before[name] != after[name]}
    assert public_key(layout.seed("ops").read_bytes()) in (layout.nats / "accounts.conf").read_text()


def test_modes_that_are_too_open_are_mended(tmp_path: Path) -> None:
    """A copy that lost them is closed again, and the output says which."""
    layout = made(tmp_path)
    layout.seed("ops").chmod(0o644)

    done = init(tmp_path)

    assert f"made {layout.seed('ops')} readable by its owner only" in done.output
    assert 0o600 == stat.S_IMODE(layout.seed("ops").stat().st_mode)


def test_a_secret_that_is_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    """Root would write, and give away, whatever it points to."""
    layout = made(tmp_path / "deployment")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    layout.seed("ops").unlink()
    layout.seed("ops").symlink_to(victim)

    done = init(tmp_path / "deployment")

    assert 1 == done.exit_code
    assert "symbolic link" in done.output
    assert "mine" == victim.read_text()


def test_a_second_name_of_another_file_is_refused(tmp_path: Path) -> None:
    """A hard link is as good as a symbolic one; what a crash of an earlier run left is none."""
    layout = made(tmp_path / "deployment")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    accounts = layout.nats / "accounts.conf"
    os.link(accounts, accounts.with_name(".accounts.conf.new"))
    assert 0 == init(tmp_path / "deployment").exit_code
    assert not accounts.with_name(".accounts.conf.new").exists()
    accounts.unlink()
    accounts.hardlink_to(victim)

    done = init(tmp_path / "deployment")

    assert 1 == done.exit_code
    assert "is a link, or no regular file" in done.output
    assert ("mine", 0o644) == (victim.read_text(), stat.S_IMODE(victim.stat().st_mode))


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_that_appears_between_a_look_and_the_change_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The user of the containers owns the folders, and may exchange what is in them while root works there."""
    layout = made(tmp_path / "deployment")
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o755)
    victim = outside / "ops.seed"
    victim.write_bytes(layout.seed("ops").read_bytes())
    victim.chmod(0o644)
    genuine = Secrets.mend

    def exchange(secrets: Secrets, path: Path, **others: Any) -> None:
        if path == layout.seed("ops"):
            if kind == "file":
                path.unlink()
                path.symlink_to(victim)
            else:
                layout.users.rename(tmp_path / "users")
                layout.users.symlink_to(outside)
        genuine(secrets, path, **others)

    monkeypatch.setattr(Secrets, "mend", exchange)

    done = init(tmp_path / "deployment")

    assert 1 == done.exit_code
    assert "symbolic link" in done.output
    assert 0o644 == stat.S_IMODE(victim.stat().st_mode)


# -- the authority ----------------------------------------------------------------------------------------------------


def test_certificates_are_the_authoritys_and_good_for_both_sides(tmp_path: Path) -> None:
    """A route is a connection between equals; names are the node's own and loopback's."""
    layout = made(tmp_path)
    authority = x509.load_pem_x509_certificate(layout.ca_certificate.read_bytes())

    for node in ("n1", "n2", "n3"):
        certificate = x509.load_pem_x509_certificate(layout.node_certificate(node).read_bytes())
        certificate.verify_directly_issued_by(authority)
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert {"serverAuth", "clientAuth"} == {one._name for one in usage}
        assert [node, "localhost", "127.0.0.1"] == names_in(layout.node_certificate(node).read_bytes())
        assert timedelta(0) < NODE_LIFETIME - (certificate.not_valid_after_utc - datetime.now(UTC)) < timedelta(days=1)


def test_openssl_accepts_the_chain_in_its_strictest_mode(tmp_path: Path) -> None:
    """Python 3.13 verifies like that by default."""
    layout = made(tmp_path)
    context = ssl.create_default_context(cafile=layout.ca_certificate)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(layout.node_certificate("n1"), layout.node_key("n1"))

    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client_side = context.wrap_bio(to_client, to_server, server_hostname="127.0.0.1")
    server_side = server.wrap_bio(to_server, to_client, server_side=True)
    done = [False, False]
    for _ in range(4):
        for index, side in enumerate((client_side, server_side)):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            done[index] = True

    assert [True, True] == done


@pytest.mark.parametrize("lost", [["ca.key"], ["ca.pem"], ["ca.key", "ca.pem"]])
def test_an_authority_that_is_gone_is_not_replaced(tmp_path: Path, lost: list[str]) -> None:
    """No process would trust a new one: the operator restores the old one."""
    layout = made(tmp_path)
    for name in lost:
        (layout.secrets / name).unlink()
    before = contents(layout.secrets)

    for arguments in ([], ["--rotate", "certificates"]):
        done = init(tmp_path, *arguments)

        assert 1 == done.exit_code
        assert "restore the authority" in done.output
        assert before == contents(layout.secrets)


def test_a_certificate_of_another_authority_is_noticed(tmp_path: Path) -> None:
    """Two deployments mixed up; renewing heals it."""
    layout, other = made(tmp_path / "a"), made(tmp_path / "b")
    for kind in (Layout.node_certificate, Layout.node_key):
        kind(layout, "n2").write_bytes(kind(other, "n2").read_bytes())

    refused = init(tmp_path / "a")
    assert 1 == refused.exit_code
    assert f"{layout.node_certificate('n2')} is not of this deployment" in refused.output

    made(tmp_path / "a", "--rotate", "certificates")
    made(tmp_path / "a")


# -- hosts ------------------------------------------------------------------------------------------------------------


def test_hosts_stand_in_the_certificates_and_in_the_environment(tmp_path: Path) -> None:
    """One node each, in order; names and addresses."""
    layout = made(tmp_path, "--hosts", "a.example.org,10.0.0.2, b.example.org")

    local = ["localhost", "127.0.0.1"]
    names = {node: names_in(layout.node_certificate(node).read_bytes()) for node in layout.known_nodes()}
    assert {
        "n1": ["n1", *local, "a.example.org"],
        "n2": ["n2", *local, "10.0.0.2"],
        "n3": ["n3", *local, "b.example.org"],
    } == names
    text = layout.environment.read_text()
    assert "#NODE_NAME=n2\n#NODE_HOST=10.0.0.2\n" in text
    assert "FI_LOG_URL=nats://a.example.org:4222,nats://10.0.0.2:4222,nats://b.example.org:4222\n" in text
    assert '"nats://10.0.0.2:6222"' in text


def test_hosts_that_join_get_certificates_and_the_others_keep_theirs(tmp_path: Path) -> None:
    """From three nodes to five."""
    layout = made(tmp_path, "--hosts", "a,b,c")
    before = contents(layout.nodes)

    made(tmp_path, "--hosts", "a,b,c,d,e")

    after = contents(layout.nodes)
    assert ["n1", "n2", "n3", "n4", "n5"] == layout.known_nodes()
    assert before == {name: content for name, content in after.items() if name in before}
    made(tmp_path)


def test_other_hosts_need_a_renewal(tmp_path: Path) -> None:
    """A certificate is not changed in passing: a node must be reloaded afterwards."""
    layout = made(tmp_path, "--hosts", "a,b,c")
    before = contents(layout.secrets)

    refused = init(tmp_path, "--hosts", "a,b,x")
    assert 1 == refused.exit_code
    assert "n3.pem is not for x: renew all with  --rotate certificates" in refused.output
    assert before == contents(layout.secrets)

    made(tmp_path, "--rotate", "certificates", "--hosts", "a,b,x")
    assert ["n3", "localhost", "127.0.0.1", "x"] == names_in(layout.node_certificate("n3").read_bytes())


@pytest.mark.parametrize(
    ("hosts", "problem"),
    [
        ("a,b", "2 nodes cannot be a cluster"),
        ("a,b,b", "name it once"),
        ("a,b,c d", "neither a host name nor an address"),
        ("a,b,-c", "neither a host name nor an address"),
        ("a,b,c;rm", "neither a host name nor an address"),
    ],
)
def test_hosts_that_make_no_cluster_are_refused(tmp_path: Path, hosts: str, problem: str) -> None:
    """Before anything is made."""
    done = init(tmp_path / "deployment", "--hosts", hosts)

    assert 2 == done.exit_code
    assert problem in done.output
    assert not (tmp_path / "deployment").exists()


@pytest.mark.parametrize("owner", ["me", "1:", "1:me", "-1"])
def test_an_owner_that_is_no_number_is_refused(tmp_path: Path, owner: str) -> None:
    """Names mean other users in a container."""
    done = CliRunner().invoke(app, ["init", str(tmp_path / "deployment"), f"--owner={owner}"])

    assert (2, False) == (done.exit_code, (tmp_path / "deployment").exists())


# -- renewing ---------------------------------------------------------------------------------------------------------


def test_certificates_are_renewed_by_the_same_authority_for_the_same_names(tmp_path: Path) -> None:
    """In the same files: a container has mounted them one by one."""
    layout = made(tmp_path, "--hosts", "a,b,c")
    before, inode = contents(layout.secrets), layout.node_certificate("n2").stat().st_ino

    done = init(tmp_path, "--rotate", "certificates")

    after = contents(layout.secrets)
    assert "SIGHUP" in done.output
    assert {f"nodes/n{n}.{kind}" for n in (1, 2, 3) for kind in ("pem", "key")} == {
        name for name in after if before[name] != after[name]
    }
    assert inode == layout.node_certificate("n2").stat().st_ino
    assert ["n2", "localhost", "127.0.0.1", "b"] == names_in(after["nodes/n2.pem"])
    old, new = (x509.load_pem_x509_certificate(found["nodes/n2.pem"]) for found in (before, after))
    assert old.not_valid_after_utc <= new.not_valid_after_utc
    made(tmp_path)


def test_users_are_renewed_in_two_steps(tmp_path: Path) -> None:
    """First the nodes take both keys, then the seeds change and the nodes take the new ones alone."""
    layout = made(tmp_path)
    accounts = layout.nats / "accounts.conf"
    old = {user: public_key(layout.seed(user).read_bytes()) for user in USERS}
    inode = layout.seed("ingest").stat().st_ino

    assert f"fiq init {tmp_path} --rotate users-finish" in init(tmp_path, "--rotate", "users").output
    new = {user: public_key(layout.next_seed(user).read_bytes()) for user in USERS}
    assert {*old.values(), *new.values()} == set(re.findall(r"nkey: (U\w+)", accounts.read_text()))
    assert old == {user: public_key(layout.seed(user).read_bytes()) for user in USERS}
    assert f"{tmp_path}: nothing is missing, nothing was changed" in init(tmp_path, "--rotate", "users").output

    made(tmp_path, "--rotate", "users-finish")
    assert new == {user: public_key(layout.seed(user).read_bytes()) for user in USERS}
    assert set(new.values()) == set(re.findall(r"nkey: (U\w+)", accounts.read_text()))
    assert inode == layout.seed("ingest").stat().st_ino
    assert not list(layout.users.glob("*.next"))


@pytest.mark.parametrize("moved", range(len(USERS) + 1))
def test_a_second_step_that_was_cut_short_is_finished_by_the_next_run(tmp_path: Path, moved: int) -> None:
    """Wherever it ended: some seeds in their places, accounts.conf still with both keys."""
    layout = made(tmp_path)
    made(tmp_path, "--rotate", "users")
    new = {user: public_key(layout.next_seed(user).read_bytes()) for user in USERS}
    for user in USERS[:moved]:
        layout.seed(user).write_bytes(layout.next_seed(user).read_bytes())
        layout.next_seed(user).unlink()

    made(tmp_path, "--rotate", "users-finish")

    assert new == {user: public_key(layout.seed(user).read_bytes()) for user in USERS}
    assert set(new.values()) == set(re.findall(r"nkey: (U\w+)", (layout.nats / "accounts.conf").read_text()))


def test_a_second_step_without_a_first_is_refused(tmp_path: Path) -> None:
    """Nothing would be new."""
    made(tmp_path)

    done = init(tmp_path, "--rotate", "users-finish")

    assert 1 == done.exit_code
    assert "begin one with  --rotate users" in done.output


@pytest.mark.parametrize("what", ["certificates", "users", "users-finish"])
def test_nothing_can_be_renewed_that_was_never_made(tmp_path: Path, what: str) -> None:
    """A wrong folder must not become half a deployment."""
    done = init(tmp_path / "elsewhere", "--rotate", what)

    assert 1 == done.exit_code
    assert "fiq init" in done.output
    assert not (tmp_path / "elsewhere").exists()


# -- what is written --------------------------------------------------------------------------------------------------


def test_the_token_is_kept_as_a_hash_for_the_service(tmp_path: Path) -> None:
    """Who reads the service's file cannot post."""
    layout = made(tmp_path)

    token = layout.token("default").read_text().strip()
    name, digest, *_ = layout.tokens.read_text().splitlines()[-1].split()
    assert ("default", hashlib.sha256(token.encode()).hexdigest()) == (name, digest)
    assert len(token) >= 40


def test_disks_are_encrypted_only_from_the_beginning(tmp_path: Path) -> None:
    """Another key, or one that comes later, would make what is stored unreadable."""
    key = made(tmp_path / "with", "--encrypt").nats / "at-rest.conf"
    before = key.read_text()
    made(tmp_path / "with")
    made(tmp_path / "with", "--encrypt")
    assert before == key.read_text()
    assert re.search(r'^key: "[\w-]{43}"\ncipher: aes$', before, re.MULTILINE)

    made(tmp_path / "without")
    refused = init(tmp_path / "without", "--encrypt")
    assert 1 == refused.exit_code
    assert "not encrypted" in refused.output


def test_no_secret_stands_in_what_nodes_and_compose_read(tmp_path: Path) -> None:
    """Public keys only; and the output names files, no contents."""
    done = init(tmp_path)
    layout = Layout(tmp_path)
    secrets = [layout.seed(user).read_text().strip() for user in USERS] + [layout.token("default").read_text().strip()]
    shown = [done.output, layout.environment.read_text(), *(path.read_text() for path in layout.nats.iterdir())]

    assert not [1 for secret in secrets for text in shown if secret in text]
    assert b"*\n" == layout.ignore.read_bytes()


def test_accounts_need_a_subject_for_each_user() -> None:
    """nats-server takes an empty list for everything."""
    with pytest.raises(ValueError, match="at least one subject"):
        deployment._subjects([])


def test_every_role_has_a_user_and_the_system_account_one() -> None:
    """In this order they stand in accounts.conf."""
    assert (*Role, "system") == USERS
