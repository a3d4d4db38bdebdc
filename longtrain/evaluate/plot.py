"""Curves of a run, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOSS_PLOT = "loss.png"


def plot_loss(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Training and held-out loss over tokens, from the rows of metrics.jsonl, as a PNG."""
    from matplotlib.figure import Figure  # half a second to import, and no global state when used without pyplot

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    millions = [row["tokens"] / 1e6 for row in rows]
    axes.plot(millions, [row["loss"] for row in rows], color="#9ab", linewidth=1, label="training, each step")
    axes.plot(millions, _smooth([row["loss"] for row in rows]), color="#246", linewidth=2, label="training, smoothed")
    held_out = [(row["tokens"] / 1e6, row["eval_loss"]) for row in rows if row["eval_loss"] is not None]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#d62", marker="o", linewidth=1.5, label="held-out text")
    axes.set(xlabel="million tokens", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential mean without the bias towards the first value."""
    smoothed, mean, norm = [], 0.0, 0.0
    for value in values:
        mean, norm = weight * mean + (1 - weight) * value, weight * norm + (1 - weight)
        smoothed.append(mean / norm)
    return smoothed
