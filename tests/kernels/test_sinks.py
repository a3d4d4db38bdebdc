"""Attention sinks: one more score a row, of a key whose value is 0, applied once by the Attend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longtrain.attention import AttentionKernel, AttentionMask, AttentionSpec, Band, Block, Keep, Partial
from longtrain.attention.merge import add_sinks_, empty_partial, merge_
from longtrain.attention.reference import ReferenceKernel
from longtrain.kernels.flash import FlashKernel
from longtrain.kernels.language import has_triton, interprets
from longtrain.kernels.local import LocalAttend
from longtrain.kernels.memory_efficient import MemoryEfficientKernel
from tests.attention_cases import Case, check_kernel
from tests.parity import naive_attention, results

PACKED = ((30, 1, 0, 20), (40, 17))
PLAIN = Case(Band.causal(), 63, heads=4, sinks=True)
CASES = {
    "causal": PLAIN,
    "full, cross": replace(PLAIN, band=Band.full(), k_length=20),
    "window, documents": replace(PLAIN, band=Band.causal(9), q_documents=PACKED),
    "no keys for some rows": replace(PLAIN, band=Band(5, 20)),
    "everything": Case(Band.causal(40), 63, None, 2, 4, 2, 8, 5, PACKED, None, 0.4, 2.0, True, "whole", 0.2, sinks=True),
}
FLASH = FlashKernel(interpret=True)
KERNELS = [
    ReferenceKernel(),
    MemoryEfficientKernel(16, 32),
    pytest.param(
        FLASH,
        marks=[
            pytest.mark.skipif(not has_triton() or not interprets(), reason="Triton does not interpret here"),
            pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:overflow encountered:RuntimeWarning"),
        ],
    ),
]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("name", CASES)
def test_equals_a_softmax_with_one_more_column(name: str, kernel: AttentionKernel) -> None:
    check_kernel(kernel, CASES[name], torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    for case in CASES.values():
        check_kernel(MemoryEfficientKernel(16, 32), case, dtype)


def test_they_are_a_merge_with_a_key_of_value_zero() -> None:
    t = replace(PLAIN, band=Band(5, 20)).tensors(torch.float64)
    assert t.spec.sinks is not None
    sinks = t.spec.sinks.detach()
    part = ReferenceKernel().forward(t.q, t.k, t.v, Block.of(t.mask), AttentionSpec())
    one = Partial(torch.zeros_like(part.out), sinks[:, None].expand_as(part.lse))
    merged = merge_(Partial(part.out.clone(), part.lse.clone()), one)
    torch.testing.assert_close(add_sinks_(part, sinks), merged, rtol=0, atol=1e-14)


def test_rows_that_see_nothing_see_the_sink() -> None:
    """Padding too: out is 0, lse the sink, and a gradient of lse goes to the sink alone."""
    ids = torch.tensor([[0, 0, -1]], dtype=torch.int32)
    sinks = torch.tensor([0.5, -torch.inf], requires_grad=True)
    q, k, v = (torch.randn(1, 3, 2, 4, requires_grad=True) for _ in range(3))
    attend = LocalAttend(ReferenceKernel()).with_lse
    out, lse = attend(q, k, v, AttentionMask(Band.causal(), ids, ids), AttentionSpec(sinks=sinks))
    assert (out[:, 2] == 0).all()
    assert lse[0, :, 2].tolist() == [0.5, -torch.inf]
    dq, dk, dv, dsinks = torch.autograd.grad(lse[0, 0, 2] + out[:, 2].sum(), (q, k, v, sinks))
    assert dsinks.tolist() == [1.0, 0.0]
    assert not any(x.any() for x in (dq, dk, dv))


def test_a_sink_of_minus_infinity_is_none() -> None:
    t = Case(Band(5, 20), 40, heads=4).tensors(torch.float32)
    attend = LocalAttend(ReferenceKernel()).with_lse
    sinks = torch.full((4,), -torch.inf, requires_grad=True)
    plain = results(attend, t[:3], t.mask, t.spec, t.dout, t.dlse)
    sunk = results(attend, t[:3], t.mask, replace(t.spec, sinks=sinks), t.dout, t.dlse)
    assert not sunk.pop("dsinks").any()
    for name, value in plain.items():
        torch.testing.assert_close(sunk[name], value)


def test_sinks_of_another_precision_get_a_gradient_of_theirs() -> None:
    t = PLAIN.tensors(torch.bfloat16)
    assert t.spec.sinks is not None
    sinks = t.spec.sinks.detach().float().requires_grad_()
    spec = replace(t.spec, sinks=sinks)
    got = results(LocalAttend(ReferenceKernel()).with_lse, t[:3], t.mask, spec, t.dout, t.dlse)
    exact = PLAIN.in_dtype(t, torch.float64)
    truth = results(naive_attention, exact[:3], exact.mask, exact.spec, exact.dout, exact.dlse)
    assert got["dsinks"].dtype == torch.float32
    torch.testing.assert_close(got["dsinks"].double(), truth["dsinks"], rtol=0.02, atol=0.1)


def test_kernels_are_not_asked_for_them() -> None:
    t = CASES["everything"].tensors(torch.float32)
    assert t.spec.features == {"softcap", "alibi", "bias", "dropout"}
    assert vars(t.spec.without_sinks) == vars(t.spec) | {"sinks": None}
    plain = AttentionSpec()
    assert plain.without_sinks is plain


class Watching(ReferenceKernel):
    """Counts calls and sees to it that kernels do not know of sinks."""

    def __init__(self) -> None:
        self.forwards = 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: Any, spec: AttentionSpec, **into: Any) -> Partial:
        self.forwards += 1
        assert spec.sinks is None
        return super().forward(q, k, v, block, spec, **into)


def test_recomputation_recalls_results_with_their_sinks() -> None:
    kernel, t = Watching(), PLAIN.tensors(torch.float32)
    attend = LocalAttend(kernel)
    assert t.spec.sinks is not None
    wanted = (*(x.requires_grad_() for x in t[:3]), t.spec.sinks)

    def gradients(keep: Keep | None) -> tuple[Tensor, ...]:
        def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, t.mask, t.spec, keep=keep).sin()

        out = checkpoint(block, *t[:3], use_reentrant=False)
        assert isinstance(out, Tensor)
        return torch.autograd.grad(out.sum(), wanted)

    kept = gradients(Keep())
    assert kernel.forwards == 1
    computed = gradients(None)
    assert kernel.forwards == 3
    assert all(torch.equal(a, b) for a, b in zip(kept, computed, strict=True))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"sinks are torch.float32 \[2, 1\], must be floats \[H\]"):
        AttentionSpec(sinks=torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"sinks are torch.int64 \[2\], must be floats \[H\]"):
        AttentionSpec(sinks=torch.zeros(2, dtype=torch.int64))
    for wrong in (1, 3):
        with pytest.raises(ValueError, match=rf"\[{wrong}\] sinks for 2 query heads: give one a head"):
            add_sinks_(empty_partial(torch.zeros(1, 3, 2, 4), 4), torch.zeros(wrong))
