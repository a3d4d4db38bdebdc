"""What commands say on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.console import Console

from longtrain.errors import LaunchError

LABEL_WIDTH = 16
PIPE_WIDTH = 200


def say(text: str) -> None:
    Console().print(text, highlight=False, soft_wrap=True, markup=False)


def say_lines(lines: Iterable[tuple[str, str]]) -> None:
    for what, value in lines:
        say(f"{what:{LABEL_WIDTH}} {value}")


def table_console() -> Console:
    """A console for tables, which in a pipe do not wrap at 80 columns."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)


def say_aside(text: str) -> None:
    """To stderr, with the rank where it is not the main one."""
    number = rank()
    print(f"rank {number}: {text}" if number else text, file=sys.stderr, flush=True)


def rank() -> int:
    """This process among those that torchrun started; 0 where the environment does not say."""
    from longtrain.parallel.launch import Launch

    try:
        return Launch.read().rank
    except LaunchError:
        return 0
