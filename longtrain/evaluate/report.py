"""A run in a few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any


def summary(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(what, value) of a run, from the rows of metrics.jsonl (at least one)."""
    first, last = rows[0], rows[-1]
    lines = [
        ("steps", f"{last['step']:,}, {last['tokens']:,} tokens"),
        ("training loss", _fall(first["loss"], last["loss"])),
    ]
    held_out = [row["eval_loss"] for row in rows if row["eval_loss"] is not None]
    if held_out:
        lines.append(("held-out loss", _fall(held_out[0], held_out[-1])))
    lines.append(("tokens/s", f"{median(row['tokens_per_second'] for row in rows):,.0f} over all ranks (median step)"))
    if last["mfu_causal"] is not None:
        causal, full = (median(row[key] for row in rows) for key in ("mfu_causal", "mfu_full"))
        lines.append(("MFU", f"{causal:.1%} causal, {full:.1%} full square (median step)"))
    lines.append(("memory", f"{max(row['memory_gib'] for row in rows):.2f} GiB on the main rank"))
    return lines


def _fall(first: float, last: float) -> str:
    return f"{first:.3f} -> {last:.3f} ({last / first - 1:+.0%})"
