"""Where reports go: a file of JSON lines always, and the console; others join through `Trackers`. Only the main rank tracks."""

from __future__ import annotations

import json
import math
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, Protocol, TypeGuard, get_type_hints

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from longtrain.errors import CheckpointError
from longtrain.train.checkpoint_folder import set_aside
from longtrain.train.metrics import Metrics

METRICS_FILE = "metrics.jsonl"
WAITING = 10_000
"""Reports that wait at most for a tracker in the background, or for a disk that is full: hours of them."""
PATIENCE = 60.0
"""Seconds that the end of a run waits for a tracker in the background."""
# what newer versions added has a default, so that a run of an older version can go on
_KEYS = {field.name for field in fields(Metrics) if field.default is MISSING}
_COUNTS = {name for name, kind in get_type_hints(Metrics).items() if kind is int}


class Tracker(Protocol):
    """Receives the reports of a run. What a tracker that inherits from this does not define, it does not care for."""

    def log(self, metrics: Metrics) -> None:
        """One report."""

    def say(self, text: str) -> None:
        """A remark for people: a checkpoint, a warning."""

    def keep(self, paths: Sequence[Path]) -> None:
        """Files and folders of the run that are worth keeping: plots, the exported model."""

    def go_back(self, step: int) -> None:
        """The run is at this step again: what was reported of later ones no longer counts."""

    def close(self) -> None:
        """Nothing comes after this."""


class JsonLines(Tracker):
    """metrics.jsonl: one object a line, keys as in `Metrics`.

    What the disk does not take, because it is full, waits in memory and is written, in order, when that is possible again: no
    report ends training. complain: tells people that, and at the end which reports are lost. waiting: reports that wait at most.
    A file that is damaged or foreign is kept under another name, and a new one begun; that is told too.
    """

    def __init__(
        self, path: Path, resumed_step: int, complain: Callable[[str], None] | None = None, *, waiting: int = WAITING
    ) -> None:
        """Goes on after `resumed_step`: later lines, of steps that will be done again, and a torn last line are dropped.

        Raises OSError where the file cannot be opened.
        """
        self._path, self._complain, self._most = path, complain or say_on_stderr, waiting
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._lost: list[int] = []
        self._failed: OSError | None = None
        self._size = self._size_until(resumed_step)
        self._file = path.open("ab", buffering=0)
        self._write()

    def log(self, metrics: Metrics) -> None:
        line = json.dumps(_finite(asdict(metrics)), allow_nan=False) + "\n"
        self._waiting.append((metrics.step, line.encode()))
        if len(self._waiting) > self._most:
            self._lost.append(self._waiting.popleft()[0])
        self._write()

    def say(self, text: str) -> None:
        # perhaps that a checkpoint is saved, from which a run that is killed now goes on, without what still waits
        self._write()

    def go_back(self, step: int) -> None:
        self._waiting = deque(row for row in self._waiting if row[0] <= step)
        self._lost = [lost for lost in self._lost if lost <= step]
        self._size = min(self._size, self._size_until(step))
        # perhaps another one now
        before, self._file = self._file, self._path.open("ab", buffering=0)
        with suppress(OSError):
            before.close()
        self._write()

    def close(self) -> None:
        self._write()
        lost = [*self._lost, *(step for step, _ in self._waiting)]
        if lost:
            reason = f": {self._failed.strerror}" if self._failed else ""
            self._complain(f"ERROR: {self._path}{reason}: the reports of {_steps(lost)} are lost")
        with suppress(OSError):
            self._file.close()

    def _size_until(self, step: int) -> int:
        """Bytes of the whole lines before the first report of a later step; 0 where the file had to be set aside."""
        try:
            rows = read_metrics(self._path)
        except CheckpointError as error:
            self._complain(f"WARNING: {error}. It is now {set_aside(self._path).name}, and reports go on in a new file")
            return 0
        size = 0
        for line, row in zip(_whole_lines(self._path), rows, strict=True):
            if row["step"] > step:
                break
            size += len(line) + 1
        return size

    def _write(self) -> None:
        """Writes what waits, as far as the disk takes it."""
        waited = [step for step, _ in self._waiting]
        try:
            # what is behind is of steps that will be done again, or half a line where even the cut below failed
            self._size = min(self._size, os.fstat(self._file.fileno()).st_size)
            self._file.truncate(self._size)
            while self._waiting:
                left = line = self._waiting[0][1]
                while left:
                    left = left[self._file.write(left) :]
                self._size += len(line)
                self._waiting.popleft()
        except OSError as error:
            if self._failed is None:
                since = f" from step {waited[0]} on" if waited else ""
                self._complain(
                    f"WARNING: {self._path}: {error.strerror}: training goes on, and its reports{since} wait in memory until they "
                    "can be written"
                )
            self._failed = error
            with suppress(OSError):
                self._file.truncate(self._size)
            return
        if self._failed is not None:
            self._complain(f"{self._path} can be written again{f': it has the reports of {_steps(waited)}' if waited else ''}")
        self._failed = None


class Terminal(Tracker):
    """A progress bar on a terminal, plain lines in a log."""

    def __init__(self, console: Console, steps: int, done: int) -> None:
        self._console = console
        self._steps = steps
        self._progress: Progress | None = None
        if console.is_terminal:
            # together less than 80 columns: rich cuts what does not fit
            columns = (
                MofNCompleteColumn(),
                BarColumn(bar_width=10),
                TextColumn("{task.description}"),
                TimeRemainingColumn(compact=True),
            )
            self._progress = Progress(*columns, console=console)
            self._task = self._progress.add_task("", total=steps, completed=done)
            self._progress.start()

    def log(self, metrics: Metrics) -> None:
        if self._progress is None:
            self.say(f"step {metrics.step}/{self._steps}  {summary(metrics)}")
            return
        self._progress.update(self._task, completed=metrics.step, description=short_summary(metrics))
        if metrics.eval_loss is not None:
            self.say(f"step {metrics.step}  {summary(metrics)}")

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def go_back(self, step: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


class Background(Tracker):
    """A tracker in a thread of its own, where it may be slow, hang or fail: training neither waits for it nor ends with it.

    name: for people. make: makes the tracker, in the thread. complain: tells people, in one line, what went wrong, from the thread.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Tracker],
        complain: Callable[[str], None],
        *,
        waiting: int = WAITING,
        patience: float = PATIENCE,
    ) -> None:
        self._name, self._make, self._complain, self._patience = name, make, complain, patience
        self._events: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(waiting)
        self._failed = self._lost = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def log(self, metrics: Metrics) -> None:
        self._post(lambda tracker: tracker.log(metrics))

    def say(self, text: str) -> None:
        self._post(lambda tracker: tracker.say(text))

    def keep(self, paths: Sequence[Path]) -> None:
        self._post(lambda tracker: tracker.keep(paths))

    def go_back(self, step: int) -> None:
        self._post(lambda tracker: tracker.go_back(step))

    def close(self) -> None:
        """Waits for what is still to be told, but no longer than `patience` seconds."""
        self._post(None)
        self._thread.join(self._patience)
        if self._thread.is_alive():
            self._warn(f"did not finish within {self._patience:.0f} s")
            self._failed = True

    def _post(self, event: Callable[[Tracker], None] | None) -> None:
        if self._failed:
            return
        try:
            self._events.put_nowait(event)
        except queue.Full:
            if not self._lost:
                self._warn("does not keep up, and misses reports from here on")
            self._lost = True

    def _work(self) -> None:
        try:
            tracker = self._make()
            while (event := self._events.get()) is not None:
                event(tracker)
            tracker.close()
        except BaseException as error:  # a library may even call sys.exit
            self._failed = True
            reason = str(error).strip().splitlines()
            self._warn(f"failed ({type(error).__name__}{': ' + reason[0] if reason else ''}) and gets nothing more")

    def _warn(self, what: str) -> None:
        self._complain(f"WARNING: {self._name} {what}; training is not affected, and {METRICS_FILE} holds every report")


class Redrawn(Tracker):
    """Calls `draw` now and then, so that it takes no more than a hundredth of the time; not in the first minute. Where
    the disk takes no plot, it says so once and tries again."""

    def __init__(self, draw: Callable[[], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._draw, self._clock = draw, clock
        self._next = clock() + 60
        self._failed = False

    def log(self, metrics: Metrics) -> None:
        begin = self._clock()
        if begin >= self._next:
            try:
                self._draw()
                self._failed = False
            except OSError as error:
                if not self._failed:
                    say_on_stderr(f"WARNING: the plots could not be drawn: {error}; training goes on")
                self._failed = True
            end = self._clock()
            self._next = end + 100 * (end - begin)


class Trackers:
    """Several trackers as one; none on ranks that do not report. run_id: the id of this run where an experiment tracker has one,
    for the checkpoints. What a tracker cannot write ends nothing: it is told on stderr, once for each tracker."""

    def __init__(self, trackers: Sequence[Tracker] = (), run_id: str | None = None) -> None:
        self._trackers, self.run_id = trackers, run_id
        self._failed: set[int] = set()

    def log(self, metrics: Metrics) -> None:
        self._tell(lambda tracker: tracker.log(metrics))

    def say(self, text: str) -> None:
        self._tell(lambda tracker: tracker.say(text))

    def keep(self, paths: Sequence[Path]) -> None:
        self._tell(lambda tracker: tracker.keep(paths))

    def go_back(self, step: int) -> None:
        # an error here ends the run: what was not taken back would be reported twice
        for tracker in self._trackers:
            tracker.go_back(step)

    def close(self) -> None:
        self._tell(lambda tracker: tracker.close())

    def _tell(self, event: Callable[[Tracker], None]) -> None:
        for number, tracker in enumerate(self._trackers):
            try:
                event(tracker)
            except OSError as error:
                if number not in self._failed:
                    say_on_stderr(f"WARNING: {type(tracker).__name__} cannot write: {error}; training goes on")
                self._failed.add(number)


def say_on_stderr(text: str) -> None:
    """Loudly, whatever becomes of stdout; where stderr cannot be written either, nothing."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def summary(metrics: Metrics) -> str:
    """One line for people."""
    parts = [f"loss {metrics.loss:.4f}"]
    if metrics.eval_loss is not None:
        parts.append(f"held-out {metrics.eval_loss:.4f}")
    # of a step that was skipped it is not known: what made the update impossible is in the gradients
    norm = f"{metrics.grad_norm:.2f}" if math.isfinite(metrics.grad_norm) else "-"
    parts += [f"lr {metrics.lr:.2e}", f"grad {norm}", f"{metrics.tokens_per_second:,.0f} tokens/s"]
    if metrics.tokens_per_second != metrics.tokens_per_second_per_rank:
        parts.append(f"({metrics.tokens_per_second_per_rank:,.0f} a rank)")
    if metrics.mfu_causal is not None and metrics.mfu_full is not None:
        parts.append(f"MFU {metrics.mfu_causal:.1%} causal {metrics.mfu_full:.1%} full")
    return "  ".join([*parts, f"{metrics.memory_gib:.1f} GiB"])


def short_summary(metrics: Metrics) -> str:
    """Short enough to stand beside a progress bar on 80 columns."""
    parts = [f"loss {metrics.loss:.4f}", f"{metrics.tokens_per_second:,.0f} tokens/s"]
    return "  ".join(parts if metrics.mfu_causal is None else [*parts, f"MFU {metrics.mfu_causal:.1%}"])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The reports of a run so far, keys as in `Metrics`; nothing where there is no file. A torn last line is left out.

    Raises CheckpointError where another line is no report, or not of a later step than the one before.
    """
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(_whole_lines(path), 1):
        row: Any = None
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
        # a wrong step would cut off at the next start what comes after it
        if not _is_report(row) or (rows and row["step"] <= rows[-1]["step"]):
            raise CheckpointError(
                f"{path}:{number}: is no report of a run, or not of a later step than the line before; the file is damaged or "
                "foreign: remove that line, or move it away"
            )
        rows.append(row)
    return rows


def _whole_lines(path: Path) -> list[bytes]:
    """Without their ends; a last one that is torn has none."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def _is_report(row: Any) -> TypeGuard[dict[str, Any]]:
    """Whether it has what every report has, and what it has is of the kind that `Metrics` says; a null was not finite."""
    if not isinstance(row, dict) or not row.keys() >= _KEYS:
        return False
    known = {field.name: row[field.name] for field in fields(Metrics) if field.name in row}
    spans = known.pop("eval_by_position", None)
    if not all(isinstance(value, int if name in _COUNTS else int | float | None) for name, value in known.items()):
        return False
    return spans is None or (isinstance(spans, list) and all(map(_is_span, spans)))


def _is_span(span: Any) -> bool:
    match span:
        case [int(), int(), int() | float() | None, int()]:
            return True
    return False


def _steps(steps: Sequence[int]) -> str:
    """In words, for people."""
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"


def _finite(value: Any) -> Any:
    """None in the place of what JSON lacks: nan and infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
