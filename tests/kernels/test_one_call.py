"""One call is torch's scaled_dot_product_attention where both can do it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longtrain.attention import AttentionMask, AttentionSpec, Band
from longtrain.errors import KernelError
from longtrain.kernels.one_call import attention


def tensors() -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 33, heads, 16, generator=draw, requires_grad=True) for heads in (4, 2, 2))


@pytest.mark.parametrize("documents", [False, True])
def test_it_is_torchs(documents: bool) -> None:
    q, k, v = tensors()
    ids = torch.tensor([0] * 10 + [1] * 20 + [2] * 3, dtype=torch.int32).expand(2, -1)
    allowed = torch.ones(33, 33, dtype=torch.bool).tril()
    if documents:
        allowed = allowed & (ids[0][:, None] == ids[0][None, :])
    mask = AttentionMask(Band.causal(), ids, ids) if documents else AttentionMask(Band.causal())
    found = attention(q, k, v, mask)
    q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
    expected = scaled_dot_product_attention(q_, k_, v_, attn_mask=allowed, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    dout = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(out, (q, k, v), dout) for out in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_reasons_where_no_kernel_can() -> None:
    q, k, v = tensors()
    with pytest.raises(KernelError, match="triton cannot do this: runs on CUDA GPUs"):
        attention(q, k, v, AttentionMask(Band.causal()), kernel="triton")
    with pytest.raises(KernelError, match="there is no kernel 'nope'"):
        attention(q, k, v, AttentionMask(Band.causal()), AttentionSpec(softcap=3.0), kernel="nope")
