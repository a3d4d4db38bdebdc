"""Plots of benchmark results, beside their JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def attention_plot(path: Path) -> Path:
    """TFLOP/s of every problem, forward above backward, one bar a library: an SVG beside the JSON file."""
    from matplotlib.figure import Figure

    found = json.loads(path.read_text())
    rows = [row for row in found["rows"] if "naive" not in row["results"]]
    names = list(dict.fromkeys(name for row in rows for name in row["results"]))
    figure = Figure(figsize=(max(7.0, 0.75 * len(rows)), 7), layout="constrained")
    for axes, direction in zip(figure.subplots(2, 1, sharex=True), ("forward", "backward"), strict=True):
        _bars(axes, [row["results"] for row in rows], names, direction)
        axes.set_ylabel(f"{direction}, TFLOP/s")
    axes.set_xticks(range(len(rows)), [row["problem"]["name"] for row in rows], rotation=40, ha="right")
    figure.suptitle(f"Attention, bf16, {found['device']}, torch {found['versions']['torch']}")
    figure.axes[0].legend(ncols=len(names))
    target = path.with_suffix(".svg")
    figure.savefig(target, metadata={"Date": None})
    return target


def _bars(axes: Any, rows: list[dict[str, dict[str, float]]], names: list[str], value: str) -> None:
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        at = [
            (x + (i - (len(names) - 1) / 2) * width, row[name][value]) for x, row in enumerate(rows) if value in row.get(name, {})
        ]
        axes.bar([x for x, _ in at], [y for _, y in at], width, label=name)
    axes.grid(axis="y", alpha=0.3)
