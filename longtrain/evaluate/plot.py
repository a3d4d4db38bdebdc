"""Curves of a run, for people."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS_PLOT = "loss.png"
POSITION_PLOT = "loss_by_position.png"
# file: (key of metrics.jsonl, label of the axis)
CURVES = {
    "throughput.png": ("tokens_per_second", "tokens/s over all ranks"),
    "memory.png": ("memory_gib", "GiB on the main rank, at most so far"),
    "grad_norm.png": ("grad_norm", "gradient norm before clipping"),
}
EVALUATIONS = 5
"""Curves of loss by position in one plot."""
# matplotlib is not made for several threads; and what the later one draws, which has more, must be what stays
_DRAWING = threading.Lock()

Point = tuple[float, float]


def draw_plots(rows: Sequence[Mapping[str, Any]], title: str, folder: Path) -> list[Path]:
    """Every plot that the rows of metrics.jsonl have something for, into `folder`; each appears whole or not at all. Of several
    threads that call this, one draws after another."""
    if not rows:
        return []
    with _DRAWING:
        figures = {LOSS_PLOT: loss_figure(rows, title)}
        if any(row.get("eval_by_position") for row in rows):
            figures[POSITION_PLOT] = position_figure(rows, title)
        figures |= {name: curve_figure(rows, key, label, title) for name, (key, label) in CURVES.items()}
        for name, figure in figures.items():
            part = folder / f".{name}.tmp"
            figure.savefig(part, dpi=120, format="png")
            part.replace(folder / name)
    return [folder / name for name in figures]


def loss_figure(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Training and held-out loss over tokens; steps without a loss leave no point."""
    figure, axes = _figure("million tokens", "loss (nats per token)", title)
    training = _points(rows, "loss")
    axes.plot(*_columns(training), color="#9ab", linewidth=1, marker=_marker(training), label="training, as reported")
    axes.plot(*_columns(_smooth(training)), color="#246", linewidth=2, label="training, smoothed")
    held_out = _points(rows, "eval_loss")
    if held_out:
        axes.plot(*_columns(held_out), color="#d62", marker="o", linewidth=1.5, label="held-out text")
    axes.legend()
    return figure


def position_figure(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Held-out loss by position in the document, of the first evaluation, the last, and some between: a model that uses its context
    falls to the right."""
    figure, axes = _figure("position in the document (tokens of context)", "held-out loss (nats per token)", title)
    evaluations = [row for row in rows if row.get("eval_by_position")]
    last = len(evaluations) - 1
    chosen = sorted({round(last * i / (EVALUATIONS - 1)) for i in range(EVALUATIONS)})
    for place, index in enumerate(chosen):
        # a span of positions stands at its geometric middle
        spans = evaluations[index]["eval_by_position"]
        points = [(math.sqrt((first + 1) * (last + 1)), loss) for first, last, loss, _ in spans if loss is not None]
        shade = 0.25 + 0.75 * (place + 1) / len(chosen)
        axes.plot(*_columns(points), color="#d62", alpha=shade, marker="o", label=f"step {evaluations[index]['step']:,}")
    axes.set_xscale("log", base=2)
    axes.legend()
    return figure


def curve_figure(rows: Sequence[Mapping[str, Any]], key: str, label: str, title: str) -> Figure:
    """One number of the reports over tokens; where it was not finite there is no point."""
    figure, axes = _figure("million tokens", label, title)
    points = _points(rows, key)
    axes.plot(*_columns(points), color="#246", linewidth=1, marker=_marker(points))
    axes.set_ylim(bottom=0)
    return figure


def _figure(across: str, up: str, title: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # half a second to import, and no global state when used without pyplot

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=across, ylabel=up, title=title)
    axes.grid(alpha=0.3)
    return figure, axes


def _marker(points: Sequence[Point]) -> str | None:
    """A line of one point cannot be seen."""
    return "o" if len(points) == 1 else None


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    return [(row["tokens"] / 1e6, row[key]) for row in rows if row[key] is not None]


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _smooth(points: Sequence[Point], weight: float = 0.9) -> list[Point]:
    """Exponential mean without the bias towards the first value."""
    smoothed, mean, norm = [], 0.0, 0.0
    for x, y in points:
        mean, norm = weight * mean + (1 - weight) * y, weight * norm + (1 - weight)
        smoothed.append((x, mean / norm))
    return smoothed
