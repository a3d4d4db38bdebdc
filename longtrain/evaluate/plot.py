"""Curves of a run, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSS_PLOT = "loss.png"

Point = tuple[float, float]


def plot_loss(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Training and held-out loss over tokens, from the rows of metrics.jsonl, as a PNG that appears whole or not at all."""
    part = path.with_name(f".{path.name}.tmp")
    loss_figure(rows, title).savefig(part, dpi=120, format="png")
    part.replace(path)


def loss_figure(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """The figure of `plot_loss`: steps without a loss leave no point."""
    from matplotlib.figure import Figure  # half a second to import, and no global state when used without pyplot

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    training = _points(rows, "loss")
    # a line of one point cannot be seen
    marker = "o" if len(training) == 1 else None
    axes.plot(*_columns(training), color="#9ab", linewidth=1, marker=marker, label="training, as reported")
    axes.plot(*_columns(_smooth(training)), color="#246", linewidth=2, label="training, smoothed")
    held_out = _points(rows, "eval_loss")
    if held_out:
        axes.plot(*_columns(held_out), color="#d62", marker="o", linewidth=1.5, label="held-out text")
    axes.set(xlabel="million tokens", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


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
