"""What commands say on the terminal."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO, cast

from rich.console import Console

from longtrain.errors import LaunchError

LABEL_WIDTH = 16
PIPE_WIDTH = 200

# what writing meets where the reader of a pipe, or a terminal, has gone
_GONE = (errno.EPIPE, errno.EIO)


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


def warn(text: str) -> None:
    """To stderr, where it does not mix with what a script reads."""
    print(f"WARNING: {text}", file=sys.stderr, flush=True)


def rank() -> int:
    """This process among those that torchrun started; 0 where the environment does not say."""
    from longtrain.parallel.launch import Launch

    try:
        return Launch.read().rank
    except LaunchError:
        return 0


class Lasting:
    """A stream of text that outlives its reader, such as `head` after ten lines: what is written after that is lost.

    The command goes on to its end and keeps its exit code. remark: said once, on stderr, when output begins to be lost.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.remark: str | None = None

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            if error.errno not in _GONE:
                raise
            # the stream still holds what it could not write, and other libraries write there too
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)
            if self.remark is not None:
                say_aside(self.remark)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_readers(remark: str | None = None) -> None:
    """Makes stdout and stderr `Lasting`. remark: what to say when stdout is lost."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Lasting):
            setattr(sys, name, cast(TextIO, Lasting(stream)))
    if isinstance(sys.stdout, Lasting):
        sys.stdout.remark = remark
