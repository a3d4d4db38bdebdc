"""A run in a few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any


def summary(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(what, value) of a run, from the rows of metrics.jsonl (at least one). What was never measured has no line."""
    last = rows[-1]
    lines = [("steps", f"{last['step']:,}, {last['tokens']:,} tokens")]
    for what, key in (("training loss", "loss"), ("held-out loss", "eval_loss")):
        losses = [(row["step"], row[key]) for row in rows if row[key] is not None]
        if losses:
            lines.append((what, _course(losses)))
    spans = next((row["eval_by_position"] for row in reversed(rows) if row.get("eval_by_position")), [])
    if len(spans) > 1:
        lines.append(("  by position", f"{_span(spans[0])} -> {_span(spans[-1])}"))
    lines.append(("tokens/s", f"{median(row['tokens_per_second'] for row in rows):,.0f} over all ranks (median step)"))
    measured = [row for row in rows if row["mfu_causal"] is not None and row["mfu_full"] is not None]
    if measured:
        causal, full = (median(row[key] for row in measured) for key in ("mfu_causal", "mfu_full"))
        lines.append(("MFU", f"{causal:.1%} causal, {full:.1%} full square (median step)"))
    lines.append(("memory", f"{max(row['memory_gib'] for row in rows):.2f} GiB on the main rank"))
    return lines


def _course(losses: Sequence[tuple[int, float]]) -> str:
    """From the first to the last of (step, loss)."""
    (first_step, first), (last_step, last) = losses[0], losses[-1]
    if first_step == last_step:
        return f"{last:.3f} at step {last_step:,}"
    change = f" ({last / first - 1:+.0%})" if first > 0 else ""
    return f"{first:.3f} at step {first_step:,} -> {last:.3f} at step {last_step:,}{change}"


def _span(span: Sequence[Any]) -> str:
    """The loss of (first, last, loss, tokens)."""
    first, last, loss, _ = span
    return f"{'no number' if loss is None else f'{loss:.3f}'} at positions {first:,} to {last:,}"
