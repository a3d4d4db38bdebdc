"""benchmarks/timing.py on a GPU of clocks: the host's pace is never in a figure, and nobody has the cool card to himself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks import timing
from benchmarks.timing import ASLEEP, CYCLES, ROUNDS, Work, in_turns, milliseconds
from tests.fake_gpu import FakeGpu


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    found = FakeGpu(CYCLES)
    monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=found))
    monkeypatch.setattr(timing, "time", found)
    return found


@pytest.mark.parametrize(("host", "device"), [(0.01, 1.0), (0.5, 0.05), (5.0, 0.1), (30.0, 2.0), (90.0, 3.0)])
def test_the_hosts_pace_is_not_in_the_figure(gpu: FakeGpu, host: float, device: float) -> None:
    """Ten runs of 30 ms on the host are more than the GPU sleeps for: they are queued a few at a time."""
    assert milliseconds(gpu.run(host, device)) == pytest.approx(device)
    assert max(gpu.slept) <= max(1 + ASLEEP, 1 + 1.5 * host)


def test_a_host_that_becomes_slow_is_noticed(gpu: FakeGpu) -> None:
    """As quick as can be while its pace is taken, ten times as slow later."""
    calls = iter(range(1000))

    def run() -> None:
        gpu.run(0.1 if next(calls) < 2 else 1.0, 0.2)()

    work = Work(run)
    assert work.times(20) == pytest.approx([0.2] * 20)
    assert next(calls) > 22, "runs that the GPU woke up among are thrown away"


def test_a_run_that_waits_for_the_gpu_is_measured_with_its_waits(gpu: FakeGpu) -> None:
    assert 2.0 <= milliseconds(gpu.run(1.0, 2.0, waits=True)) <= 4.0


def test_everyone_in_turns(gpu: FakeGpu) -> None:
    """A card that slows down while it works slows everyone down alike."""
    order: list[str] = []
    speed = {"a": 1.0, "b": 1.0, "c": 2.0}

    def run(name: str) -> None:
        if order[-1:] != [name]:
            order.append(name)
        gpu.run(0.01, speed[name] * (1 + gpu.now / 1e4))()

    times = in_turns({name: lambda name=name: run(name) for name in speed}, budget=40)
    assert ROUNDS == 4
    assert "".join(order) == "abc" + "abc" + "ba" + "bc" + "ba", "a pace of each, and four rounds, every other one backwards"
    assert times["a"] == pytest.approx(times["b"], rel=0.02)
    assert times["c"] == pytest.approx(2 * times["a"], rel=0.05)


def test_a_card_at_its_limit_of_power(gpu: FakeGpu) -> None:
    """Quick for its first second of work; what is measured is what it keeps up."""

    def run() -> None:
        gpu.run(0.01, 1.0 if gpu.now < 1000 else 1.2)()

    assert in_turns({"a": run, "b": run})["a"] == pytest.approx(1.0)
    gpu.now = 0.0
    gpu.until = 0.0
    assert in_turns({"a": run, "b": run}, heat=1500.0) == pytest.approx({"a": 1.2, "b": 1.2})
