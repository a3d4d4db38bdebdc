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
    keep_going: whether it outlives a full disk too, or whatever else it cannot be written for: what it then cannot hold back is
    lost, and a line on stderr says so once, until it can be written again; else OSError is raised.
    """

    def __init__(self, stream: TextIO, *, keep_going: bool = False) -> None:
        self._stream = stream
        self.remark: str | None = None
        self.keep_going = keep_going
        self._full, self._written = False, True

    def write(self, text: str) -> int:
        self._written = self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        # a stream without a buffer fails in `write`, and then has nothing to flush
        if self._attempt(self._stream.flush) and self._written:
            self._full = False

    def _attempt(self, act: Callable[[], object]) -> bool:
        """Whether it went well."""
        try:
            act()
            return True
        except OSError as error:
            if error.errno in _GONE:
                # the stream still holds what it could not write, and other libraries write there too
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, self._stream.fileno())
                os.close(nothing)
                if self.remark is not None:
                    say_aside(self.remark)
            elif not self.keep_going:
                raise
            elif not self._full:
                self._full = True
                say_aside(f"WARNING: {self._place()}: {error.strerror}: the work goes on, what it prints meanwhile is lost")
        return False

    def _place(self) -> str:
        """The stream's name, and the file that it goes to where the system tells."""
        name = getattr(self._stream, "name", "output")
        try:
            return f"{name} to {os.readlink(f'/proc/self/fd/{self._stream.fileno()}')}"
        except (OSError, ValueError):
            return name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_readers(remark: str | None = None) -> None:
    """Makes stdout and stderr `Lasting`. remark: what to say when stdout is lost, by commands whose work is not what they print:
    neither stream ends them for any reason."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Lasting):
            setattr(sys, name, cast(TextIO, Lasting(stream)))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Lasting):
            stream.keep_going = remark is not None
    if isinstance(sys.stdout, Lasting):
        sys.stdout.remark = remark
