from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from longtrain.attention import AttentionKernel, Band, Needs
from longtrain.errors import KernelError, LongtrainError
from longtrain.kernels.registry import kernels, kinds_of, select

NEEDS = Needs(frozenset(("causal", "full")), True, frozenset(), 64, 64, torch.bfloat16, "cpu")


@dataclass
class Picky:
    name: str
    reasons: list[str]

    def refuses(self, needs: Needs) -> list[str]:
        return [*self.reasons, *(["no dropout"] if "dropout" in needs.features else [])]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    backward = forward


FAST, SLOW, NEVER = Picky("fast", []), Picky("slow", []), Picky("never", ["needs a GPU of 2040", "needs head_dim 3"])
ALL: tuple[AttentionKernel, ...] = (NEVER, FAST, SLOW)


def test_takes_the_fastest_that_can() -> None:
    choice = select(NEEDS, candidates=ALL)
    assert choice.kernel is FAST
    assert choice.others == {"never": "needs a GPU of 2040; needs head_dim 3", "slow": "slower than fast"}


def test_by_name() -> None:
    choice = select(NEEDS, "slow", ALL)
    assert choice.kernel is SLOW
    assert choice.others == {"never": "needs a GPU of 2040; needs head_dim 3", "fast": "able, but slow was asked for"}


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


def test_auto_leaves_unproven_kernels_alone() -> None:
    needs, unproven = replace(NEEDS, device="cuda"), Picky("triton", [])
    choice = select(needs, candidates=(unproven, SLOW))
    assert choice.kernel is SLOW
    assert "ask for it by name" in choice.others["triton"]
    assert select(needs, "triton", (unproven, SLOW)).kernel is unproven


def test_there_is_always_a_kernel() -> None:
    everything = replace(
        NEEDS, kinds=frozenset(("full", "causal", "window", "band")), features=frozenset(("softcap", "alibi", "bias", "dropout"))
    )
    assert select(everything).kernel.name == "memory_efficient"
    assert select(everything, "reference").kernel.name == "reference"
    names = [kernel.name for kernel in kernels()]
    assert len(set(names)) == len(names)
    assert names[-1] == "reference"


def test_kinds_of_a_schedule() -> None:
    assert kinds_of([Band.full(), Band.causal(), Band.causal(), Band(1, None)]) == {"full", "causal", "band"}
