"""docs/cli.md documents every command, argument and option of the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from services.cli.main import app

DOCUMENT = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
GROUP: Any = typer.main.get_command(app)


def section(command: str) -> str:
    """Return the section of *command* without its heading."""
    found = re.search(rf"^## fiq {re.escape(command)}\n(.*?)(?=^## |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    return found.group(1) if found else ""


def commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every command with its whole name; a group is one besides its own."""
    for name, command in group.commands.items():
        yield prefix + name, command
        yield from commands(command, f"{prefix}{name} ") if hasattr(command, "commands") else ()


COMMANDS = dict(commands(GROUP))
#: options of many commands, listed above the first section
COMMON = {
    name
    for entry in re.findall(r"^- (`--[^:]*):", DOCUMENT.partition("\n## ")[0], re.MULTILINE)
    for name in re.findall(r"--[\w-]+", entry)
}


def parameters() -> Iterator[tuple[str, str]]:
    """Yield each command with each of its parameters' names as a user writes them."""
    for whole, command in COMMANDS.items():
        for parameter in command.params:
            is_argument = parameter.param_type_name == "argument"
            names = [parameter.name.upper()] if is_argument else [*parameter.opts, *parameter.secondary_opts]
            for name in names:
                if name not in {"-h", "--help"}:
                    yield whole, name


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_has_a_section(command: str) -> None:
    """Each command is documented."""
    assert section(command).strip()


@pytest.mark.parametrize(("command", "name"), list(parameters()), ids=lambda value: str(value).lstrip("-"))
def test_every_parameter_is_documented(command: str, name: str) -> None:
    """Options are in the section of their command, in code font, or among the common ones."""
    assert name in COMMON or re.search(rf"`(?:[^`\n]* )?{re.escape(name)}\b[^`\n]*`", section(command)), (
        f"fiq {command} {name}"
    )


def test_no_section_is_about_a_command_that_is_gone() -> None:
    """The document follows the program in both directions."""
    described = re.findall(r"^## fiq ([\w -]+)$", DOCUMENT, re.MULTILINE)

    assert sorted(COMMANDS) == sorted(described)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_no_documented_option_is_gone(command: str) -> None:
    """Options that the section lists are options that the command takes."""
    known = {name for parameter in COMMANDS[command].params for name in parameter.opts}
    listed = {
        name
        for row in re.findall(r"\b[Oo]ptions: (.*)$", section(command), re.MULTILINE)
        for span in re.findall(r"`([^`]+)`", row)
        for name in re.findall(r"(?<!\S)--?[\w-]+", span)
    }

    assert listed <= known
