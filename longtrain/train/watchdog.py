"""Ending a job that is stuck: a thread of every rank notices when no rank does anything any more.

A rank that waits in a collective for a slow one is not stuck. So the ranks count their signs of life together, in the store through
which they met, and a rank gives up when neither it nor any other has given one for too long. No collective is run here, and none is
waited for: the threads work while the main one is inside one. The store, the disk and stderr, which may hang too, have threads of
their own.
"""

from __future__ import annotations

import faulthandler
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from longtrain.parallel.context import ParallelContext
from longtrain.recipe.secret import hidden
from longtrain.train.signals import LAST_WORDS, beside
from longtrain.train.tracking import say_on_stderr

STUCK = 70
"""Exit code of a process that was stuck: EX_SOFTWARE of sysexits.h."""
STACKS = "stacks"
"""Folder in the run's for the stacks of stuck ranks."""
GRACE = 10.0
"""Seconds that a stuck rank waits for the stacks of all to be written and, in the last LAST_WORDS of them, for its words to be
taken."""
LOOKS = 10
"""How many times the watchdog looks in the time that it is given."""
HEARD = 8
"""How many times, at least, it looks in GRACE whether another rank gives up: it must write its own stacks in that time."""
SLOW = 4
"""How many times as long the start, which reads weights, the first step, which compiles, a roll-back, and closing may take."""
CLOSING = "closing"
"""The phase after an error: of a checkpoint on its way, of trackers, of the engine."""
START = 30.0
"""Seconds that the start and closing may take at least: they do not get shorter with the model."""

LONGEST = 1e7
"""Seconds, a third of a year: longer ones are none that a lock can wait for."""

Beat = Callable[[int, str], None]
"""Told of every phase that begins, with the number of its step, and again in a roll-back, while it reads."""


def longest_patience(ctx: ParallelContext) -> float:
    """Seconds without a sign of life after which the stacks are on disk before a collective gives up, which ends its process."""
    return math.inf if ctx.world == 1 else (ctx.timeout.total_seconds() - GRACE) / (1 + 3 / LOOKS)


class Watchdog:
    """A context in which every `seconds` must bring a sign of life; None: whatever happens. One at a time in a process.

    folder: of the run. Signs of life are `beat`, `alive` and, in the phase "save", that files of this rank's checkpoint grow. Else
    the stacks of all threads of all ranks go to `folder`/stacks, and the processes end with exit code STUCK, after at most
    1.3 x `seconds` + GRACE; SLOW times `seconds` where that is said, and never more than `longest_patience`. A process that was
    stopped as a whole, as by a debugger or by Slurm, has its time again when it goes on. Where C code keeps the interpreter, so
    that no thread of Python runs, the stacks go to stderr after `seconds` + GRACE, and the process is not ended: what could do it
    cannot tell that from one that was stopped.
    """

    def __init__(self, ctx: ParallelContext, folder: Path, seconds: float | None) -> None:
        self._rank, self._world, self._folder = ctx.rank, ctx.world, folder
        self._longest = longest_patience(ctx)
        self._seconds = None if seconds is None else min(seconds, self._longest, LONGEST)
        self._at, self._why = (0, "start"), ""
        self._first: int | None = None
        self._own = self._all = 0
        self._others_end = False
        self._ended, self._ending = threading.Event(), threading.Event()
        self._stores: list[Any] = []
        self._threads: list[threading.Thread] = []
        if ctx.world > 1 and seconds is not None:
            store: Any = dist.distributed_c10d._get_default_store()
            # a clone has its own connection: another thread that waits in the store would hold up this one
            clones = (store.clone(), store.clone())
            self._stores = [dist.PrefixStore("longtrain/watchdog", clone) for clone in clones]  # pyright: ignore

    def beat(self, step: int, phase: str) -> None:
        """Tells that `phase` of the step of this number begins."""
        self._first = step if self._first is None else self._first
        self._at = (step, phase)
        self.alive()

    def closing(self, error: BaseException) -> None:
        """Tells that the run ends with an error, which is told too where it cannot end."""
        self._why = f", after {type(error).__name__}: {hidden(str(error))}"
        self.beat(self._at[0], CLOSING)

    def alive(self) -> None:
        """Tells that the phase goes on."""
        self._own += 1

    def __enter__(self) -> Watchdog:
        if self._seconds is not None:
            poll = self._seconds / LOOKS
            soon = min(poll, GRACE / HEARD)
            for work, *given in ((self._judge, soon, self._seconds), (self._exchange, poll), (self._listen, soon)):
                thread = threading.Thread(target=work, args=given, name="watchdog", daemon=True)
                thread.start()
                self._threads.append(thread)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._ending.is_set():
            # this rank's collective failed because another has left already: that is not the reason to be told
            time.sleep(2 * GRACE)
        self.done()

    def done(self) -> None:
        """Ends the watch, before the context does."""
        self._ended.set()
        for thread in self._threads:  # one that is inside the store while the interpreter ends makes the process abort
            thread.join(1.0)
        faulthandler.cancel_dump_traceback_later()

    def _judge(self, poll: float, seconds: float) -> None:
        """Touches nothing that could hang."""
        seen, heard = (-1, -1), time.monotonic()
        looked = heard
        _watch_interpreter(seconds)
        while not self._ended.wait(poll):
            _watch_interpreter(seconds)
            signs, now = (self._own, self._all), time.monotonic()
            if signs != seen or now - looked > poll + seconds / 2:
                seen, heard = signs, now
            looked = now
            step, phase = self._at
            slow = SLOW * seconds if step == self._first or phase in ("start", "roll-back", CLOSING) else seconds
            patience = min(max(slow, START) if phase in ("start", CLOSING) else slow, self._longest)
            if self._others_end or now - heard > patience:
                self._end(now - heard)

    def _exchange(self, poll: float) -> None:
        """Adds this rank's signs of life to those of all, and hears of theirs."""
        told, grown = 0, 0
        while not self._ended.wait(poll):
            size = self._saved_bytes() if self._at[1] in ("save", CLOSING) else grown
            if size != grown:
                grown = size
                self.alive()
            if not self._stores:
                continue
            own = self._own
            try:
                self._all = self._stores[0].add("signs", own - told)
                told = own
            except RuntimeError:  # its host is gone: then this rank stands alone
                return

    def _listen(self, poll: float) -> None:
        """Hears that another rank gives up. Apart from what is counted, which is asked of the disk too, and far less often."""
        while self._stores and not self._others_end and not self._ended.wait(poll):
            try:
                self._others_end = self._stores[1].check(["stuck"])
            except RuntimeError:
                return

    def _saved_bytes(self) -> int:
        """Of this rank, in a checkpoint that is being written."""
        total = 0
        with suppress(OSError):  # what is measured is renamed meanwhile, when it is whole
            for path in self._folder.glob(f"checkpoints/step-*.tmp/rank-{self._rank:05d}*"):
                total += path.stat().st_size
        return total

    def _end(self, silent: float) -> None:
        self._ending.set()
        step, phase = self._at
        path = self._folder / STACKS / f"step-{step:08d}-rank-{self._rank:05d}.txt"
        reason = "another rank found all stuck" if self._others_end else f"no sign of life from any rank for {silent:.1f} s"
        headline = f"rank {self._rank}: stuck at step {step}, {phase}{self._why}: {reason}"
        ending = f"ending with exit code {STUCK}; --resume auto goes on from the newest checkpoint"
        try:
            said = beside(lambda: say_on_stderr(f"{headline}; stacks of its threads: {path}; {ending}"))
            write = beside(lambda: _write_stacks(path, headline))
            beside(lambda: self._farewell(write)).join(GRACE - LAST_WORDS)
            if write.is_alive():  # the disk may be what all wait for
                said = beside(lambda: say_on_stderr(_stacks()))
            said.join(LAST_WORDS)
        finally:
            os._exit(STUCK)

    def _farewell(self, write: threading.Thread) -> None:
        """Tells the other ranks, and waits until the stacks of all are written."""
        if not self._stores:
            write.join()
            return
        with suppress(RuntimeError):  # the store is gone
            self._stores[1].set("stuck", "")
        write.join()
        with suppress(RuntimeError):
            written = self._stores[1].add("written", 1)
            while written < self._world:
                time.sleep(0.05)
                written = self._stores[1].add("written", 0)


def _watch_interpreter(seconds: float) -> None:
    """Has the thread of faulthandler, which needs no interpreter, write the stacks where those of Python do not come here again."""
    with suppress(RuntimeError):  # no thread can be started
        faulthandler.dump_traceback_later(seconds + GRACE, file=2)


def _write_stacks(path: Path, headline: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", errors="backslashreplace") as file:
            file.write(f"{headline}\n\n{_stacks()}")
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        say_on_stderr(_stacks())


def _stacks() -> str:
    """Of all threads, the innermost call first.

    Not by faulthandler, which writes while it holds the interpreter: where nobody reads, or a disk hangs, all threads would stop.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for number, frame in sys._current_frames().items():
        lines.append(f"Thread {names.get(number, number)}:")
        for inner, line in traceback.walk_stack(frame):
            lines.append(f'  File "{inner.f_code.co_filename}", line {line} in {inner.f_code.co_name}')
    return "\n".join(lines) + "\n"
