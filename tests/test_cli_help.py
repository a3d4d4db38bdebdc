"""What --help says, of every command."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from longtrain.cli import app
from longtrain.cli.app import train_app
from longtrain.cli.options import group
from longtrain.cli.prepare import prepare_data
from tests.user import REPOSITORY


def script(function: Any) -> typer.Typer:
    made = group()
    made.command()(function)
    return made


def helps(command: Any, path: str) -> Iterator[tuple[str, str]]:
    """(command line, its help) of a command and those below it."""
    yield path, command.get_help(command.context_class(command, info_name=path))
    for name, below in getattr(command, "commands", {}).items():
        yield from helps(below, f"{path} {name}")


CONVERT = runpy.run_path(str(REPOSITORY / "scripts" / "convert_checkpoint.py"))["convert"]
APPS = {"longtrain": app, "train.py": train_app, "prepare_data.py": script(prepare_data), "convert_checkpoint.py": script(CONVERT)}
HELPS = dict(pair for name, made in APPS.items() for pair in helps(typer.main.get_command(made), name))


def test_all_of_them_are_looked_at() -> None:
    assert len(HELPS) >= 20
    assert {"longtrain plan", "longtrain checkpoint import", "prepare_data.py"} <= HELPS.keys()


@pytest.mark.parametrize("path", HELPS)
def test_help_is_whole_sentences(path: str) -> None:
    text = HELPS[path]
    assert not re.search(r"\w [.,;:](\s|$)", text), "something was taken for markup and left out"
    listed = re.search(r"(?s)\nCommands:\n(.*)", text)
    assert listed is None or "..." not in listed[1], "a first sentence is too long for the list of commands"
    assert not re.search(r"(?m)^  --.*<(str|int|float|path|list)", text), "an option's value has a kind instead of a name"


def test_defaults_are_shown() -> None:
    text = " ".join(HELPS["prepare_data.py"].split())
    for words in ("[default: 32000; stdlib: 4096]", "[default: 0.02; stdlib: fixed files]", "[default: text]", "[default: 0.1%]"):
        assert words in text
