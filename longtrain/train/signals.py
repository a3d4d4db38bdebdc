"""Being asked to stop: SIGTERM, SIGUSR1 or SIGINT, on any rank, at any moment.

The first one only sets a flag, which the ranks look at together before every step. The second one ends the process at once, also
where its main thread is inside a collective and runs no Python: a thread of its own reads the signals from a pipe. What is said
is said beside it: a pipe that nobody reads may be full, and then takes no word for ever.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

STOPPED = 75
"""Exit code of a run that was asked to stop and saved: EX_TEMPFAIL of sysexits.h, "try again"."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME = 1.0
"""Seconds in which a second signal counts as the first: batch systems signal every process, and torchrun passes its own on."""
LAST_WORDS = 2.0
"""Seconds that a process which ends waits for what it says to be taken."""


def beside(act: Callable[[], object]) -> threading.Thread:
    """A thread that does this, for what may wait for ever, as for a reader or a disk: it keeps no process from ending.

    Raises RuntimeError where the system allows no more threads.
    """
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


class StopSignals:
    """A context in which the signals are a request to stop. Does nothing outside the main thread, where Python gets none.

    say: tells people, once for the first signal. last_words: called when the second one ends the process, which waits LAST_WORDS
    seconds for it. Each in a thread of its own. kept: what the first one leaves behind, in words.
    """

    def __init__(
        self, say: Callable[[str], None], last_words: Callable[[], None] = lambda: None, kept: str = "with a checkpoint"
    ) -> None:
        self._say, self._last_words, self._kept = say, last_words, kept
        self._first: tuple[signal.Signals, float] | None = None
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None

    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self._first is not None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        read, write = self._pipe = os.pipe()
        os.set_blocking(write, False)
        self._fd_before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        # what the handlers would do, the thread does
        self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        threading.Thread(target=self._listen, args=(read,), name="signals", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pipe is None:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._pipe[1])  # the thread reads the end, and closes the other one
        self._pipe = None

    def _listen(self, read: int) -> None:
        while numbers := os.read(read, 64):
            for number in numbers:
                if number in SIGNALS:
                    self._receive(signal.Signals(number))
        os.close(read)

    def _receive(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = number, now
            text = f"{number.name}: stopping after this step, {self._kept}; once more ends it at once, with nothing saved"
            with suppress(RuntimeError):  # no thread can be started any more
                beside(lambda: self._say(text))
        elif now > self._first[1] + SAME:
            try:
                streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None]
                last = [beside(act) for act in (self._last_words, *(stream.flush for stream in streams))]
                until = now + LAST_WORDS
                for thread in last:
                    thread.join(max(0.0, until - time.monotonic()))
            finally:
                os._exit(128 + number)
