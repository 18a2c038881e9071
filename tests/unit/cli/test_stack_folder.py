"""The folder of a running stack: one holder, and a state that is never stale."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from services.cli.embedded.stack import Member, Stack, StackFolder, StackState
from services.cli.errors import AlreadyRunningError, CommandError, NotRunningError

STATE = StackState(
    pid=1,
    log_url="nats://127.0.0.1:1",
    ingest_url="http://127.0.0.1:2",
    data_dir="/data",
    members=(Member("n1", 3, "nats://127.0.0.1:1", "http://127.0.0.1:4"),),
)


@pytest.fixture
def folder(tmp_path: Path) -> StackFolder:
    """A folder that does not exist yet."""
    return StackFolder(tmp_path / "stack")


def test_only_one_process_holds_a_folder(folder: StackFolder) -> None:
    """The second one learns which process holds it."""
    with folder.held(), pytest.raises(AlreadyRunningError, match=f"process {os.getpid()}"), folder.held():
        pass


def test_a_folder_is_free_again_after_its_holder(folder: StackFolder) -> None:
    """The lock goes with the holder; the file may stay."""
    with folder.held():
        pass
    with folder.held():
        assert folder.path.is_dir()


def test_the_folder_is_private_and_in_no_repository(folder: StackFolder) -> None:
    """It holds medical data."""
    with folder.held():
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
        assert (folder.path / ".gitignore").read_text() == "*\n"


def test_a_folder_that_others_can_read_is_closed(folder: StackFolder) -> None:
    """Another program made it, or an older copy of it lost its mode."""
    folder.path.mkdir()
    folder.path.chmod(0o755)
    with folder.held():
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700


def test_the_state_is_read_while_the_holder_lives(folder: StackFolder) -> None:
    """What one process writes the others read."""
    with folder.held():
        folder.write(STATE)
        assert folder.read() == STATE


def test_the_state_of_a_dead_holder_does_not_count(folder: StackFolder) -> None:
    """After kill -9 of the holder the file is still there, but its lock is not."""
    with folder.held():
        folder.write(STATE)

    with pytest.raises(NotRunningError, match="fiq up"):
        folder.read()


def test_a_stack_that_is_not_ready_yet_is_said_to_be_so(folder: StackFolder) -> None:
    """Between the lock and the state, waiting helps."""
    with folder.held(), pytest.raises(NotRunningError, match="not ready yet"):
        folder.read()


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"members": [1]}'])
def test_a_damaged_state_is_a_clear_error(folder: StackFolder, content: bytes) -> None:
    """No traceback of a parser."""
    with folder.held():
        (folder.path / "state.json").write_bytes(content)
        with pytest.raises(NotRunningError, match="damaged"):
            folder.read()


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    """A file in its place, for example."""
    (tmp_path / "file").touch()

    with pytest.raises(CommandError, match="--folder"), StackFolder(tmp_path / "file" / "stack").held():
        pass


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    """Said in so many words: "File exists" would be a riddle."""
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(CommandError, match=r"file is not a directory"), StackFolder(file).held():
        pass


def test_a_folder_above_the_working_directory_is_named_as_nats_server_names_it(tmp_path: Path) -> None:
    """Its nodes say where they store, without "..": another name would be another server's."""
    stack = Stack(tmp_path / "a" / ".." / "b")
    assert (tmp_path / "b", tmp_path / "b" / "cluster") == (stack.folder, stack.cluster.folder)
