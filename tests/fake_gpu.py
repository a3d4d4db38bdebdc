"""A GPU of nothing but clocks, and a host that takes its time, for what benchmarks do with `torch.cuda` and `time.perf_counter`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class FakeGpu:
    """Times in ms. work: what a GPU does in turn, queued at `now` of the host; the GPU is busy until `until`."""

    def __init__(self, cycles: int) -> None:
        self.cycles, self.now, self.until = cycles, 0.0, 0.0
        self.slept = list[float]()

    def run(self, host: float, device: float, waits: bool = False) -> Callable[[], None]:
        """Work that takes the host so long to queue and the GPU so long to do."""

        def queued() -> None:
            self.now += host
            self.until = max(self.until, self.now) + device
            if waits:
                self.synchronize()

        return queued

    def synchronize(self) -> None:
        self.now = max(self.now, self.until)

    def perf_counter(self) -> float:
        return self.now / 1e3

    def _sleep(self, cycles: int) -> None:
        self.slept.append(cycles / self.cycles)
        self.until = max(self.until, self.now) + cycles / self.cycles

    def Event(self, enable_timing: bool = False) -> Any:  # noqa: N802
        return FakeEvent(self)

    def memory_allocated(self) -> int:
        return 0

    def max_memory_allocated(self) -> int:
        return 2**20

    def reset_peak_memory_stats(self) -> None:
        pass

    empty_cache = reset_peak_memory_stats


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.at = gpu, 0.0

    def record(self) -> None:
        self.at = max(self.gpu.until, self.gpu.now)

    def query(self) -> bool:
        return self.gpu.now >= self.at

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at
