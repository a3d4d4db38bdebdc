"""Where reports go: a file of JSON lines always, and the console. Only the main rank tracks."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from longtrain.errors import CheckpointError
from longtrain.files import replace_durably
from longtrain.train.metrics import Metrics

METRICS_FILE = "metrics.jsonl"
_KEYS = {field.name for field in fields(Metrics)}


class Tracker(Protocol):
    """Receives the reports of a run."""

    def log(self, metrics: Metrics) -> None: ...

    def say(self, text: str) -> None:
        """A remark for people: a checkpoint, a warning."""
        ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: one object a line, keys as in `Metrics`."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        """Goes on after `resumed_step`: later lines, of steps that will be done again, and a torn last line are dropped."""
        rows = [row for row in read_metrics(path) if row["step"] <= resumed_step]
        replace_durably(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self._file = path.open("a")

    def log(self, metrics: Metrics) -> None:
        # JSON has no nan and no infinity
        row = {key: value if value is None or math.isfinite(value) else None for key, value in asdict(metrics).items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        self._file.close()


class Terminal:
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

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


class Trackers:
    """Several trackers as one; none on ranks that do not report."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = trackers

    def log(self, metrics: Metrics) -> None:
        for tracker in self._trackers:
            tracker.log(metrics)

    def say(self, text: str) -> None:
        for tracker in self._trackers:
            tracker.say(text)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def summary(metrics: Metrics) -> str:
    """One line for people."""
    parts = [f"loss {metrics.loss:.4f}"]
    if metrics.eval_loss is not None:
        parts.append(f"held-out {metrics.eval_loss:.4f}")
    parts += [f"lr {metrics.lr:.2e}", f"grad {metrics.grad_norm:.2f}", f"{metrics.tokens_per_second:,.0f} tokens/s"]
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

    Raises CheckpointError where another line is no report.
    """
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            row = None
        if not isinstance(row, dict) or not row.keys() >= _KEYS:
            raise CheckpointError(f"{path}:{number}: is no report of a run; the file is damaged or foreign, move it away")
        rows.append(row)
    return rows
