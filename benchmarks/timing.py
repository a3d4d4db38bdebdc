"""How every benchmark here takes the time of work on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from itertools import cycle
from typing import Any

import torch
from torch._functorch import config as functorch_config

CYCLES = 2_000_000
"""Of a GPU's clock in a millisecond, at most."""
ASLEEP = 100.0
"""Milliseconds that the GPU sleeps while runs are queued; longer only where a single run takes longer to queue."""
ROUNDS = 4
"""Of `in_turns`; an even number, so that everyone is as often early as late."""


def compile_anew() -> None:
    """Peers that are compiled are so for every problem, and their backwards are run many times."""
    torch._dynamo.config.recompile_limit = 64
    functorch_config.donated_buffer = False


class Work:
    """Something that runs on the GPU, to be measured over about `budget` ms and at most `most` runs, but at least 4.

    The GPU sleeps while runs are queued, as many at a time as the host queues meanwhile, so that the host's pace is not measured:
    runs that the GPU woke up among are thrown away and queued again, half as many for as long a sleep. Only where a single run is
    not queued in time, because it waits for the GPU itself, are its waits in the figure.
    """

    def __init__(self, run: Callable[[], Any], budget: float = 150.0, most: int = 50) -> None:
        self._run = run
        run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        self._host = (time.perf_counter() - start) * 1e3
        torch.cuda.synchronize()
        whole = (time.perf_counter() - start) * 1e3
        self.runs = max(4, min(most, int(budget / max(whole, 1e-3))))
        self._batch = max(1, min(self.runs, int(ASLEEP / max(1.5 * self._host, 1e-3))))

    def times(self, runs: int) -> list[float]:
        """Milliseconds of each of so many runs."""
        found: list[float] = []
        while len(found) < runs:
            batch = min(self._batch, runs - len(found))
            times, in_time = self._queued(batch)
            if in_time or batch == 1:
                found += times
            else:
                self._batch, self._host = batch // 2, 2 * self._host
        return found

    def _queued(self, runs: int) -> tuple[list[float], bool]:
        """And whether all were queued while the GPU slept."""
        awake = torch.cuda.Event()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
        torch.cuda._sleep(int(CYCLES * (1.0 + 1.5 * self._host * runs)))
        awake.record()
        for begin, end in events:
            begin.record()
            self._run()
            end.record()
        in_time = not awake.query()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in events], in_time


def milliseconds(run: Callable[[], Any], budget: float = 150.0, most: int = 50) -> float:
    """Median time of `run` on the GPU, after a warm-up."""
    work = Work(run, budget, most)
    return statistics.median(work.times(work.runs))


def in_turns(runs: Mapping[str, Callable[[], Any]], budget: float = 150.0, most: int = 50, heat: float = 0.0) -> dict[str, float]:
    """Median time of each, in ROUNDS rounds of all, every other one backwards: nobody has the cool card to himself.

    Before its part of a round everyone runs once unmeasured. Before the first round all work unmeasured for `heat` ms, for figures
    that are compared with those of another call: a card that comes from rest is far quicker than one that is at its limit of power,
    and takes seconds to get there.
    """
    works = {name: Work(run, budget, most) for name, run in runs.items()}
    parts = {name: -(-work.runs // ROUNDS) for name, work in works.items()}
    warm, turns = time.perf_counter() + heat / 1e3, cycle(works)
    while time.perf_counter() < warm:
        works[name := next(turns)].times(parts[name])
    found: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(ROUNDS):
        for name in list(works)[:: 1 if i % 2 == 0 else -1]:
            runs[name]()
            found[name] += works[name].times(parts[name])
    return {name: statistics.median(times) for name, times in found.items()}
