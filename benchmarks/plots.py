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
    return _save(figure, path, f"Attention, bf16, {found['device']}, torch {found['versions']['torch']}", len(names))


def layers_plot(path: Path) -> Path:
    """GB/s of every layer beside a copy's, forward above backward, one bar a library; below them what each fused layer takes off a
    block's time: an SVG beside the JSON file."""
    from matplotlib.figure import Figure

    found = json.loads(path.read_text())
    rows = found["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["results"]))
    figure = Figure(figsize=(9, 10), layout="constrained")
    *layers, block = figure.subplots(3, 1)
    for axes, direction in zip(layers, ("forward", "backward"), strict=True):
        _bars(axes, [row["results"] for row in rows], names, direction)
        axes.axhline(found["copy"], color="black", linestyle="--", linewidth=1, label="a copy")
        axes.set_ylabel(f"{direction}, GB/s")
        axes.set_xticks(range(len(rows)), [row["layer"] for row in rows], rotation=15)
    labels = [", ".join(run["fused"]) or "nothing fused" for run in found["block"]]
    bars = block.barh(labels, [run["ms"] for run in found["block"]])
    block.bar_label(bars, [f"{run['ms']:.0f} ms, {run['peak_gib']:.1f} GiB" for run in found["block"]], padding=3)
    block.invert_yaxis()
    block.set_xlim(right=1.25 * max(run["ms"] for run in found["block"]))
    block.set_xlabel("a LLaMA-7B block at 32K tokens, forward and backward, ms, by what is fused")
    return _save(figure, path, f"Fused layers, bf16, {found['device']}, torch {found['versions']['torch']}", len(names) + 1)


def loss_plot(path: Path) -> Path:
    """Milliseconds of linear + cross entropy beside its bare products, and memory besides results: an SVG beside the JSON file."""
    from matplotlib.figure import Figure

    found = json.loads(path.read_text())
    rows = found["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["results"]))
    figure = Figure(figsize=(9, 7), layout="constrained")
    for axes, value, unit in zip(
        figure.subplots(2, 1, sharex=True), ("ms", "extra_mib"), ("ms", "MiB besides dx and dW"), strict=True
    ):
        _bars(axes, [row["results"] for row in rows], names, value)
        axes.set_ylabel(unit)
    for at, row in enumerate(rows):
        bare = sum(row["bare_ms"].values())
        figure.axes[0].plot(
            (at - 0.45, at + 0.45), (bare, bare), "k--", linewidth=1, label=None if at else "its bare products, fp32"
        )
    problems = [row["problem"] for row in rows]
    axes.set_xticks(range(len(rows)), [f"{p['tokens']:,} tokens, vocabulary {p['vocabulary']:,}" for p in problems])
    return _save(figure, path, f"Linear + cross entropy, bf16, {found['device']}, torch {found['versions']['torch']}", 4)


def _save(figure: Any, path: Path, title: str, columns: int) -> Path:
    figure.suptitle(title)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns)
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
