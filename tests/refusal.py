"""A desk on which something is wrong, a command, and what it must say; and ways to spoil a desk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.recipe_desk import write_data
from tests.user import RECIPE, command, snapshot


def nothing() -> None:
    pass


def rewrite(old: str, new: str) -> Callable[[], None]:
    """Changes the recipe on the desk."""

    def change() -> None:
        assert old in RECIPE
        Path("recipe.yaml").write_text(RECIPE.replace(old, new, 1))

    return change


def overwrite(path: str | Path, content: bytes) -> Callable[[], None]:
    def change() -> None:
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(content)

    return change


def become_folder(path: str) -> Callable[[], None]:
    def change() -> None:
        Path(path).unlink()
        Path(path).mkdir()

    return change


def link(name: str, target: str) -> Callable[[], None]:
    return lambda: Path(name).symlink_to(target)


def cut(path: str | Path) -> Callable[[], None]:
    def change() -> None:
        Path(path).write_bytes(Path(path).read_bytes()[:-2])

    return change


def remove(path: str | Path) -> Callable[[], None]:
    return lambda: shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def flip(path: str | Path) -> Callable[[], None]:
    """One bit in the middle of a file."""

    def change() -> None:
        content = bytearray(Path(path).read_bytes())
        content[len(content) // 2] ^= 1
        Path(path).write_bytes(content)

    return change


def other_data() -> None:
    """Another tokenizer and other tokens, whole in themselves."""
    write_data(Path("data"), vocab_size=300, overwrite=True)
    shutil.rmtree("text")


def copy_run() -> None:
    shutil.copytree("run", "elsewhere")


@dataclass(frozen=True)
class Refusal:
    """A state of the desk, a command, and what its message must say."""

    says: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    prepare: Callable[[], None] = nothing


def set_(*overrides: str) -> tuple[str, ...]:
    return tuple(word for override in overrides for word in ("--set", override))


def refused(case: Refusal, *arguments: str) -> None:
    case.prepare()
    before = snapshot()
    said = command(*arguments, *case.arguments)
    assert said.code == 2, said.text
    for words in case.says:
        assert words in said.text
    assert snapshot() == before, "a refusal leaves everything as it was"
