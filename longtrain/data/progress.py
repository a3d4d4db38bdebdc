"""How far a preparation is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from types import TracebackType

import rich.progress
from rich.console import Console
from rich.filesize import decimal

LOG_SECONDS = 10.0


class Progress:
    """A context manager that shows `advance`. total: bytes of the sources, None where unknown; start: of these, read before."""

    def __init__(self, console: Console, total: int | None, start: int) -> None:
        self._console = console
        self._total = total
        self._start = start
        self._began = self._last = time.monotonic()
        self._line = ""
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            columns = ("[progress.description]{task.description}", rich.progress.BarColumn(), "{task.fields[state]}")
            self._bar = rich.progress.Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("tokenizing", total=self._total, state="")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif error is None:
            self._say()

    def advance(self, read: int, documents: int, tokens: int, fresh: int) -> None:
        """read: bytes of the sources; documents, tokens: written; fresh: tokens of them that this run wrote."""
        seconds = max(time.monotonic() - self._began, 1e-3)
        parts = [f"{documents:,} documents", f"{tokens:,} tokens", f"{fresh / seconds:,.0f} tokens/s"]
        if self._total and read > self._start:
            left = (self._total - read) / (read - self._start) * seconds
            parts = [f"{min(read / self._total, 1):.0%} of {decimal(self._total)}", *parts, f"{_time(left)} left"]
        self._line = ", ".join(parts)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=read, state=self._line)
        elif time.monotonic() - self._last > LOG_SECONDS:
            self._last = time.monotonic()
            self._say()

    def _say(self) -> None:
        if self._line:
            self._console.print(f"tokenizing: {self._line}", highlight=False)


def _time(seconds: float) -> str:
    minutes, hours = int(seconds / 60 + 0.5), seconds / 3600
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{hours:.1f} h"
