from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longtrain.attention import AttentionKernel, Band, Needs
from longtrain.errors import KernelError, LongtrainError
from longtrain.kernels import registry
from longtrain.kernels.measured import CPU, TABLE, Measured, measured
from longtrain.kernels.registry import BY_NAME, kernels, kinds_of, select

NEEDS = Needs(frozenset(("causal", "full")), True, frozenset(), 64, 64, torch.bfloat16, "cpu")


@dataclass
class Picky:
    name: str
    reasons: list[str]

    def refuses(self, needs: Needs) -> list[str]:
        return [*self.reasons, *(["no dropout"] if "dropout" in needs.features else [])]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    delta = backward = forward


FAST, SLOW, NEVER = Picky("fast", []), Picky("slow", []), Picky("never", ["needs a GPU of 2040", "needs head_dim 3"])
ALL: tuple[AttentionKernel, ...] = (NEVER, FAST, SLOW)


def test_takes_the_fastest_that_can() -> None:
    choice = select(NEEDS, candidates=ALL)
    assert choice.kernel is FAST
    assert choice.others == {"never": "needs a GPU of 2040; needs head_dim 3", "slow": "not measured against fast"}


def test_by_name() -> None:
    choice = select(NEEDS, "slow", ALL)
    assert choice.kernel is SLOW
    assert choice.others == {"never": "needs a GPU of 2040; needs head_dim 3", "fast": "able, but slow was asked for"}


def test_by_name_accepts_partial_results_that_are_not_fp32() -> None:
    class Rounding(Picky):
        def refuses(self, needs: Needs) -> list[str]:
            return [*super().refuses(needs), *(["rounds"] if needs.fp32_partials else [])]

    ring, rounding = replace(NEEDS, fp32_partials=True), Rounding("rounding", [])
    choice = select(ring, "rounding", (rounding, SLOW))
    assert choice.kernel is rounding
    assert choice.rounds
    assert not select(NEEDS, "rounding", (rounding, SLOW)).rounds
    assert not select(ring, "slow", (rounding, SLOW)).rounds
    auto = select(ring, candidates=(rounding, SLOW))
    assert (auto.kernel, auto.others, auto.rounds) == (SLOW, {"rounding": "rounds"}, False)
    with pytest.raises(KernelError, match="rounding cannot do this: no dropout"):
        select(replace(ring, features=frozenset(("dropout",))), "rounding", (rounding, SLOW))


def test_by_name_never_falls_back() -> None:
    with pytest.raises(KernelError) as error:
        select(NEEDS, "never", ALL)
    assert str(error.value) == (
        "attention.kernel: never cannot do this: needs a GPU of 2040; needs head_dim 3; "
        "set attention.kernel to auto or fast or slow"
    )
    with pytest.raises(KernelError) as error:
        select(NEEDS, "never", (NEVER,))
    assert str(error.value) == "attention.kernel: never cannot do this: needs a GPU of 2040; needs head_dim 3"


def test_an_unknown_name() -> None:
    with pytest.raises(KernelError, match="there is no kernel 'fats'; there are: auto, never, fast, slow"):
        select(NEEDS, "fats", ALL)


def test_none_can_gives_the_reasons_of_all() -> None:
    dropout = replace(NEEDS, features=frozenset(("dropout",)))
    with pytest.raises(LongtrainError) as error:
        select(dropout, candidates=ALL)
    assert str(error.value).splitlines() == [
        "no attention kernel can do this:",
        "  never: needs a GPU of 2040; needs head_dim 3; no dropout",
        "  fast: no dropout",
        "  slow: no dropout",
    ]


def test_auto_leaves_unproven_kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BY_NAME, "novel", "its sweep has not run yet: ask for it by name")
    unproven = Picky("novel", [])
    choice = select(NEEDS, candidates=(unproven, SLOW))
    assert choice.kernel is SLOW
    assert choice.others["novel"] == "its sweep has not run yet: ask for it by name"
    assert select(NEEDS, "novel", (unproven, SLOW)).kernel is unproven


def test_there_is_always_a_kernel() -> None:
    everything = replace(
        NEEDS, kinds=frozenset(("full", "causal", "window", "band")), features=frozenset(("softcap", "alibi", "bias", "dropout"))
    )
    assert select(everything).kernel.name == "memory_efficient"
    assert select(everything, "reference").kernel.name == "reference"
    names = [kernel.name for kernel in kernels()]
    assert len(set(names)) == len(names)
    assert names[-1] == "reference"


REAL = {kernel.name: kernel for kernel in kernels()}


@pytest.mark.parametrize(
    ("device", "dtype", "length", "order"),
    [
        ("cpu", torch.float32, None, ["memory_efficient", "reference"]),
        ("cpu", torch.float32, 512, ["reference", "memory_efficient"]),
        ("cpu", torch.bfloat16, 513, ["memory_efficient", "reference"]),
        ("cuda", torch.float16, None, ["triton", "cudnn", "flash"]),
        ("cuda", torch.float32, None, ["triton", "flash", "cudnn", "memory_efficient", "reference"]),
        ("abacus", torch.float32, None, []),
    ],
)
def test_the_order_is_the_measured_one(device: str, dtype: torch.dtype, length: int | None, order: list[str]) -> None:
    needs = replace(NEEDS, device=device, dtype=dtype, length=length)
    assert list(measured(needs).order) == order
    for able in ({"memory_efficient", "reference"}, set(REAL) - set(BY_NAME)):
        first = next((name for name in order if name in able), None)
        chosen = select(needs, candidates=tuple(Picky(name, []) for name in REAL if name in able)).kernel.name
        assert chosen == (first or next(name for name in REAL if name in able))


def test_the_order_on_cpus_is_that_of_the_medians() -> None:
    rows = json.loads((Path(__file__).parents[2] / CPU).read_text())["rows"]
    for length in {row["length"] for row in rows}:
        taken = measured(replace(NEEDS, device="cpu", length=length)).order
        times = [row["milliseconds"] for row in rows if row["length"] == length]
        assert statistics.median(t[taken[0]] / t[taken[1]] for t in times) < 1, length


def test_the_slower_ones_name_the_figures() -> None:
    choice = select(NEEDS)
    assert choice.others["reference"] == "slower than memory_efficient: see benchmarks/results/kernels-cpu.json"
    fp32 = replace(NEEDS, device="cuda", dtype=torch.float32)
    others = select(fp32, candidates=(REAL["memory_efficient"], REAL["reference"])).others
    assert others == {"reference": "not measured against memory_efficient"}


def test_where_cudnn_can_it_goes_before_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once they are proven; by name until then. No ring, window or packed batch gets them."""
    needs = replace(NEEDS, device="cuda", documents=False, head_dim=128, value_dim=128)
    able: tuple[AttentionKernel, ...] = tuple(Picky(k.name, []) if k.name == "triton" else k for k in kernels())
    assert select(needs, candidates=able).kernel.name == "triton"
    monkeypatch.setattr(registry, "BY_NAME", {})
    for change, name in (
        ({}, "cudnn"),
        ({"head_dim": 64, "value_dim": 64}, "triton"),
        ({"kinds": frozenset(("window",))}, "triton"),
        ({"documents": True}, "triton"),
        ({"fp32_partials": True}, "triton"),
    ):
        assert select(replace(needs, **change), candidates=able).kernel.name == name


def test_a_class_of_problems() -> None:
    entry = Measured("cpu", ("a",), None, frozenset((torch.bfloat16,)), frozenset(("full", "causal")), 64, 100)
    needs = replace(NEEDS, length=100)
    assert entry.covers(needs)
    assert entry.covers(replace(needs, kinds=frozenset(("full",))))
    for other in (
        {"device": "cuda"},
        {"dtype": torch.float32},
        {"kinds": frozenset(("full", "band"))},
        {"head_dim": 65},
        {"value_dim": 65},
        {"length": 101},
        {"length": None},
    ):
        assert not entry.covers(replace(needs, **other))


def test_the_table_is_about_what_there_is() -> None:
    """Kernels by their names, figures in files, and for every device an order of all as the last resort."""
    root = Path(__file__).parents[2]
    for entry in TABLE:
        assert set(entry.order) <= set(REAL)
        assert entry.source is None or (root / entry.source).is_file()
    for device in ("cpu", "cuda"):
        able = {name for name, kernel in REAL.items() if not kernel.refuses(replace(NEEDS, device=device))}
        assert able <= set(next(entry for entry in reversed(TABLE) if entry.device == device).order)


def test_kinds_of_a_schedule() -> None:
    assert kinds_of([Band.full(), Band.causal(), Band.causal(), Band(1, None)]) == {"full", "causal", "band"}
