"""How every benchmark here takes the time of work on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

CYCLES = 2_000_000
"""Of a GPU's clock in a millisecond, at most."""


def milliseconds(run: Callable[[], Any], budget: float = 150.0, most: int = 50) -> float:
    """Median time of `run` on the GPU, over about `budget` ms and at most `most` runs, after a warm-up.

    The GPU sleeps while the runs are queued, so that the host's pace is not measured.
    """
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    host = (time.perf_counter() - start) * 1e3
    torch.cuda.synchronize()
    whole = (time.perf_counter() - start) * 1e3
    runs = max(4, min(most, int(budget / max(whole, 1e-3))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    torch.cuda._sleep(int(CYCLES * min(100.0, 1.0 + 1.5 * host * runs)))
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)
