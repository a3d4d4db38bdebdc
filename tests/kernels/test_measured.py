"""The order of attention kernels on GPUs is that of the figures it names."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from longtrain.attention import Band, Needs, band_kind
from longtrain.kernels.measured import H100, measured
from longtrain.kernels.vendor import CudnnKernel

ROWS = json.loads((Path(__file__).parents[2] / H100).read_text())["rows"]
NAMES = {"ours": "triton", "varlen": "flash"}
"""What the file calls them otherwise."""


def order_and_times(row: dict) -> tuple[list[str], list[float]]:
    """Kernels in the order of the table, and forward + backward in ms, of those that are measured in this row and can be chosen."""
    problem = row["problem"]
    dim, band, packed = problem["dim"], Band(problem["band"]["lo"], problem["band"]["hi"]), bool(problem["documents"])
    needs = Needs(frozenset((band_kind(band),)), packed, frozenset(), dim, dim, torch.bfloat16, "cuda")
    times = {NAMES.get(name, name): r["forward_ms"] + r["backward_ms"] for name, r in row["results"].items() if "forward" in r}
    order = [name for name in measured(needs).order if name in times and (name != "cudnn" or dim <= CudnnKernel.widest)]
    return order, [times[name] for name in order]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["problem"]["name"])
def test_the_order_on_gpus_is_that_of_the_figures(row: dict) -> None:
    """Nobody goes before one that is faster by more than 5%."""
    order, times = order_and_times(row)
    assert len(order) >= 2
    assert all(first <= 1.05 * second for first, second in pairwise(times)), dict(zip(order, times, strict=True))


def test_what_the_table_says_of_them() -> None:
    """The figures in its comments: the first one's time of the second one's, by width, or by mask where cuDNN cannot."""
    shares: dict[str, list[float]] = {}
    for row in ROWS:
        problem, (order, times) = row["problem"], order_and_times(row)
        plain = problem["band"]["hi"] is None and not problem["documents"]
        what = f"{problem['dim']}" if plain else "masked"
        shares.setdefault(f"{what} {order[0]} of {order[1]}", []).append(times[0] / times[1])
    ranges = {name: (f"{min(found):.2f}", f"{max(found):.2f}") for name, found in shares.items()}
    assert ranges == {
        "64 triton of cudnn": ("1.00", "1.04"),
        "80 cudnn of triton": ("0.79", "0.79"),
        "128 cudnn of triton": ("0.80", "0.99"),
        "256 triton of flash": ("0.97", "0.97"),
        "masked triton of flash": ("0.53", "0.65"),
    }
