from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longtrain.attention import AttentionMask, AttentionSpec, Band, Grads, Partial
from longtrain.attention.merge import add_, cast_like, empty_partial, merge_, row_dot, zero_grads
from tests.parity import naive_attention

INFINITY = torch.inf


def partials(q: Tensor, k: Tensor, v: Tensor, cuts: list[int], band: Band) -> list[Partial]:
    return [
        Partial(*naive_attention(q, k[:, a:b], v[:, a:b], AttentionMask(band.shift(0, a)), AttentionSpec()))
        for a, b in zip([0, *cuts], [*cuts, k.shape[1]], strict=True)
    ]


@settings(max_examples=50)
@given(
    st.lists(st.integers(1, 19), max_size=6, unique=True), st.sampled_from((Band.full(), Band.causal(), Band.causal(3), Band(4, 9)))
)
def test_any_split_of_the_keys_is_the_whole(cuts: list[int], band: Band) -> None:
    q, k, v = (torch.randn(2, 20, 3, 4, dtype=torch.float64) for _ in range(3))
    whole = naive_attention(q, k, v, AttentionMask(band), AttentionSpec())
    for order in (1, -1):
        merged = empty_partial(q, 4)
        for part in partials(q, k, v, sorted(cuts), band)[::order]:
            assert merge_(merged, part) is merged
        torch.testing.assert_close(tuple(merged), whole, rtol=0, atol=1e-13)


def partial(lse: float, value: float, dtype: torch.dtype = torch.float32) -> Partial:
    return Partial(torch.full((1, 1, 1, 2), value, dtype=dtype), torch.full((1, 1, 1), lse, dtype=dtype))


@pytest.mark.parametrize(
    ("a", "b", "lse", "value"),
    [
        ((-INFINITY, 0.0), (-INFINITY, 0.0), -INFINITY, 0.0),
        ((-INFINITY, 0.0), (1.5, 3.0), 1.5, 3.0),
        ((1.5, 3.0), (-INFINITY, 0.0), 1.5, 3.0),
        ((1e4, 3.0), (-1e4, 7.0), 1e4, 3.0),
        ((-1e30, 3.0), (-INFINITY, 0.0), -1e30, 3.0),
        ((2.0, 1.0), (2.0, 3.0), 2.0 + 0.6931472, 2.0),
    ],
)
def test_extremes(a: tuple[float, float], b: tuple[float, float], lse: float, value: float) -> None:
    out, total = merge_(partial(*a), partial(*b))
    torch.testing.assert_close(out, torch.full_like(out, value))
    torch.testing.assert_close(total, torch.full_like(total, lse))


def test_merges_into_views_of_a_larger_result() -> None:
    whole = empty_partial(torch.empty(1, 4, 1, 2), 2)
    merge_(Partial(whole.out[:, 1:2], whole.lse[:, :, 1:2]), partial(0.5, 2.0))
    assert whole.lse.flatten().tolist() == [-INFINITY, 0.5, -INFINITY, -INFINITY]
    assert whole.out[0, :, 0, 0].tolist() == [0, 2, 0, 0]


@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_accumulators(dtype: torch.dtype, wide: torch.dtype) -> None:
    # a permuted view: gradients travel between ranks, so accumulators must be contiguous all the same
    q, k, v = (torch.randn(2, h, 5, d, dtype=dtype).transpose(1, 2) for h, d in ((4, 6), (2, 6), (2, 3)))
    bias = torch.randn(5, dtype=dtype).expand(2, 4, 5, 5)
    grads = zero_grads(q, k, v, bias)
    for accumulator, tensor in zip(grads, (q, k, v, bias), strict=True):
        assert accumulator is not None
        assert accumulator.is_contiguous()
        assert accumulator.dtype == wide
        assert accumulator.shape == tensor.shape
        assert not accumulator.any()
    ones = Grads(torch.ones_like(q), torch.ones_like(k), torch.ones_like(v))
    assert add_(grads, ones) is grads
    assert add_(grads, ones).dk.eq(2).all()
    narrow = cast_like(grads, q, k, v, bias)
    assert [g.dtype for g in narrow if g is not None] == [dtype] * 4
    out, lse = empty_partial(q, 3)
    assert out.dtype == lse.dtype == wide
    assert out.shape == (2, 5, 4, 3)
    assert lse.shape == (2, 4, 5)


def test_row_dot() -> None:
    a, b = torch.randn(2, 5, 3, 4, dtype=torch.bfloat16), torch.randn(2, 5, 3, 4, dtype=torch.bfloat16)
    delta = row_dot(a, b)
    assert delta.dtype == torch.float32
    assert delta.is_contiguous()
    torch.testing.assert_close(delta, torch.einsum("bthd,bthd->bht", a.float(), b.float()))
