from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from longtrain.attention import AttentionMask, AttentionSpec, Band, Keep
from longtrain.attention.reference import ReferenceKernel
from longtrain.kernels.local import LocalAttend


def test_slots() -> None:
    keep = Keep()
    assert keep.recall("attention") is None
    a, b = torch.randn(3, requires_grad=True) * 2, torch.randn(2)
    keep.store("attention", a, b)
    assert keep.recall("products") is None
    recalled = keep.recall("attention")
    assert recalled is not None
    assert [t.data_ptr() for t in recalled] == [a.data_ptr(), b.data_ptr()]
    assert not any(t.requires_grad for t in recalled)


class Counting(ReferenceKernel):
    def __init__(self) -> None:
        self.forwards = 0

    def forward(self, *args, **kwargs):
        self.forwards += 1
        return super().forward(*args, **kwargs)


def test_recomputation_recalls_instead_of_computing() -> None:
    kernel = Counting()
    attend, mask = LocalAttend(kernel), AttentionMask(Band.causal())
    q, k, v = (torch.randn(2, 9, 2, 4, requires_grad=True) for _ in range(3))

    def gradients(keep: Keep | None) -> tuple[torch.Tensor, ...]:
        def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attend(q * 2, k, v, mask, AttentionSpec(), keep=keep).sin()

        out = checkpoint(block, q, k, v, use_reentrant=False)
        assert isinstance(out, torch.Tensor)
        return torch.autograd.grad(out.sum(), (q, k, v))

    kept = gradients(Keep())
    assert kernel.forwards == 1
    computed = gradients(None)
    assert kernel.forwards == 3
    assert all(torch.equal(a, b) for a, b in zip(kept, computed, strict=True))


@pytest.mark.parametrize("run_backward", [True, False])
def test_a_keep_dies_with_its_graph(run_backward: bool) -> None:
    attend, mask, keep = LocalAttend(ReferenceKernel()), AttentionMask(Band.causal()), Keep()
    q = torch.randn(1, 4, 1, 2, requires_grad=True)
    out = checkpoint(lambda x, kept: attend(x, x, x, mask, keep=kept), q, keep, use_reentrant=False)
    assert isinstance(out, torch.Tensor)
    gone = weakref.ref(keep)
    gc.disable()
    try:
        del keep
        if run_backward:
            out.sum().backward()
        del out
        assert gone() is None, "only the garbage collector would have freed it"
    finally:
        gc.enable()
