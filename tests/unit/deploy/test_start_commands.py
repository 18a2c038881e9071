"""The three commands that start a deployment, in README.md and docs/deploy.md, fit the files and `fiq`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from services.cli.main import app

ROOT = Path(__file__).parents[3]
#: each document, and the section that has them
SECTIONS = {"README.md": "Run it for real", "docs/deploy.md": "Start"}
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def lines(document: str) -> list[str]:
    """Return the first commands of the section."""
    text = (ROOT / document).read_text(encoding="utf-8")
    section = re.search(rf"^## {SECTIONS[document]}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    block = re.search(r"^```sh\n(.*?)```", section[1], re.MULTILINE | re.DOTALL)
    assert block is not None
    return block[1].splitlines()


@pytest.fixture
def words() -> list[list[str]]:
    """The words of each line."""
    return [shlex.split(line) for line in lines("README.md")]


def test_both_documents_have_the_same_three_commands() -> None:
    """Build, make the secrets, start."""
    found = lines("README.md")
    assert 3 == len(found)
    assert found == lines("docs/deploy.md")


def test_the_commands_use_existing_files_and_one_image(words: list[list[str]]) -> None:
    """The image that is built is the one that makes the secrets, and the one that compose starts."""
    build, init, up = words
    compose = ROOT / up[up.index("-f") + 1]
    tag = build[build.index("-t") + 1]
    mounted = init[init.index("-v") + 1].removeprefix("$PWD/").partition(":")[0]

    assert ["docker", "build"] == build[:2]
    assert (ROOT / build[-1] / "Dockerfile").is_file()
    assert ["docker", "compose"] == up[:2]
    assert compose.parent == ROOT / mounted
    assert f"${{FIQ_IMAGE:-{tag}}}" == yaml.safe_load(compose.read_text())["services"]["ingest"]["image"]
    assert tag in init


def test_fiq_init_has_the_options_that_are_used(words: list[list[str]]) -> None:
    """The folder it gets is the one that is mounted."""
    init = words[1]
    name, *rest = init[init.index("fiq") + 1 :]
    arguments = [word for word in rest if not word.startswith("-")]
    options = {option for parameter in COMMANDS[name].params for option in parameter.opts}

    assert {word.partition("=")[0] for word in rest if word.startswith("-")} <= options
    assert [init[init.index("-v") + 1].rpartition(":")[2]] == arguments
    assert ["argument"] == [one.param_type_name for one in COMMANDS[name].params if one.param_type_name == "argument"]
