"""FLOPs of attention as torch.utils.flop_counter sees them. (torch compiles nothing while it counts.)"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from longtrain.attention import AttentionKernel, Band, Keep
from longtrain.attention.reference import ReferenceKernel
from longtrain.kernels.flops import backward_flops, forward_flops
from longtrain.kernels.local import LocalAttend
from longtrain.kernels.memory_efficient import MemoryEfficientKernel
from longtrain.models import ModelConfig, training_flops
from tests.attention_cases import Case, bands

KERNELS: list[AttentionKernel] = [ReferenceKernel(), MemoryEfficientKernel(8, 16)]
NAMES = ("longtrain.attention_forward", "longtrain.attention_backward")


@given(bands(), st.integers(0, 20), st.integers(0, 20))
def test_pairs_equal_a_count_of_the_dense_mask(band: Band, queries: int, keys: int) -> None:
    assert band.pairs(queries, keys) == int(band.dense(queries, keys).sum())


def test_pairs_of_a_million_tokens() -> None:
    n = 2**20
    assert Band.causal().pairs(n, n) == n * (n + 1) // 2
    assert Band.causal(4096).pairs(n, n) == sum(min(i, 4096) for i in range(1, n + 1))


def count(case: Case, attend: Callable, backward: bool = True) -> dict[str, int]:
    t = case.tensors(torch.float32)
    q, k, v = (x.requires_grad_() for x in t[:3])
    with FlopCounterMode(display=False) as counter:
        out = attend(q, k, v, t.mask, t.spec)
        if backward:
            torch.autograd.grad(out, (q, k, v), t.dout)
    return {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("band", [Band.full(), Band.causal(), Band.causal(5), Band(-3, 9)])
def test_visible_pairs_are_counted(band: Band, kernel: AttentionKernel) -> None:
    """4 D a pair and query head forward, 2.5 times that backward; whatever the kernel computes beside."""
    case = Case(band, 24, 17, heads=4, sinks=True)
    forward = case.batch * case.heads * 4 * case.dim * int(band.dense(24, 17).sum())
    assert count(case, LocalAttend(kernel)) == {NAMES[0]: forward, NAMES[1]: forward * 5 // 2}
    assert count(case, LocalAttend(kernel), backward=False) == {NAMES[0]: forward}


def test_counting_changes_no_result() -> None:
    case = Case(Band.causal(9), 24, heads=4, sinks=True, dropout=0.2, bias="rows")
    t, attend = case.tensors(torch.float32), LocalAttend(KERNELS[1])
    wanted = (*(x.requires_grad_() for x in t[:3]), t.spec.bias, t.spec.sinks)

    def run() -> list[torch.Tensor]:
        out, lse = attend.with_lse(*t[:3], t.mask, t.spec)
        return [out, lse, *torch.autograd.grad((out, lse), wanted, (t.dout, t.dlse))]  # type: ignore[arg-type]

    plain = run()
    with FlopCounterMode(display=False):
        counted = run()
    assert all(torch.equal(a, b) for a, b in zip(plain, counted, strict=True))


def test_value_dimensions_of_their_own() -> None:
    q, k, v = (1, 7, 2, 16), (1, 7, 1, 16), (1, 7, 1, 4)
    assert forward_flops(q, k, v, Band.full()) == 2 * 49 * 2 * (16 + 4)
    assert backward_flops(q, k, v, Band.full()) == 2 * 49 * 2 * (3 * 16 + 2 * 4)


def test_documents_are_not_seen() -> None:
    """The count is the band's, an upper bound."""
    case = Case(Band.causal(), 24, q_documents=((8, 8, 8), (24,)))
    assert count(case, LocalAttend(KERNELS[0])) == count(Case(Band.causal(), 24), LocalAttend(KERNELS[0]))


def test_what_a_keep_recalls_is_not_counted() -> None:
    t, keep = Case(Band.causal(), 24).tensors(torch.float32), Keep()
    attend = LocalAttend(KERNELS[0])
    attend(*t[:3], t.mask, keep=keep)
    with FlopCounterMode(display=False) as counter:
        attend(*t[:3], t.mask, keep=keep)
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize("window", [None, 5])
def test_agrees_with_the_models_count(window: int | None) -> None:
    """training_flops counts 4 D forward and 8 D backward: a kernel's fifth product, the scores again, is no useful work."""
    config = ModelConfig("llama", 97, 32, 3, 4, 2, 8, 48, 64, window=window)
    boundaries = ((0, 24), (0, 24))
    tokens = sum(end - start for row in boundaries for start, end in pairwise(row))
    empty = training_flops(config, ((0, 0),), 0).causal
    matrices = training_flops(config, tuple((0, *range(1, 25)) for _ in boundaries), 24).causal  # documents of one token
    one_pair = 12 * config.head_dim * config.heads * config.layers
    attention = training_flops(config, boundaries, 24).causal - (matrices - one_pair * tokens)
    assert empty == 0
    counted = count(Case(Band.causal(window), 24, heads=4, kv_heads=2), LocalAttend(KERNELS[1]))
    assert 3 * config.layers * counted[NAMES[0]] == attention
    assert 3 * config.layers * counted[NAMES[1]] * 2 == attention * 5
