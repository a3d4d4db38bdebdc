from __future__ import annotations

from dataclasses import replace
from math import inf, nan

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from longtrain.attention import AttentionMask, AttentionSpec, Band, Block, Needs, Partial
from longtrain.attention.merge import empty_partial, zero_grads
from longtrain.attention.reference import ReferenceKernel
from longtrain.kernels.local import LocalAttend
from tests.attention_cases import BIAS_SHAPES, Case, cases, check_kernel
from tests.parity import results

KERNEL = ReferenceKernel()
PACKED = ((5, 1, 0, 17), (24,))
"""Documents of 24 positions: of one token, of none, of all, and one position of padding in row 0."""


@settings(max_examples=250)
@given(cases())
def test_equals_autograd_in_fp64(case: Case) -> None:
    check_kernel(KERNEL, case, torch.float64)


EVERYTHING = Case(Band.causal(9), 24, None, 2, 6, 2, 8, 5, PACKED, None, 0.4, 2.0, True, "whole", 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "case", [EVERYTHING, replace(EVERYTHING, dropout=0.0, alibi=False, softcap=None, bias=None), Case(q_length=111, dim=32)]
)
def test_lower_precision(case: Case, dtype: torch.dtype) -> None:
    check_kernel(KERNEL, case, dtype)


@pytest.mark.parametrize("shape", BIAS_SHAPES)
def test_bias_of_every_broadcast_shape(shape: str) -> None:
    check_kernel(KERNEL, replace(EVERYTHING, bias=shape), torch.float64)
    check_kernel(KERNEL, Case(Band.full(), 7, 12, heads=4, kv_heads=1, bias=shape), torch.float64)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_torch(kv_heads: int, causal: bool) -> None:
    q, k, v, dout, _, mask, spec = Case(Band(0 if causal else None), 33, None, 2, 4, kv_heads, 8).tensors(torch.float64)

    def torch_attention(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)
        return out, out.new_zeros(())

    ours = results(LocalAttend(KERNEL).with_lse, (q, k, v), mask, spec, dout)
    theirs = results(torch_attention, (q, k, v), mask, spec, dout)
    for name in ("out", "dq", "dk", "dv"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-12)


def test_finite_differences() -> None:
    q, k, v, _, _, mask, spec = replace(EVERYTHING, q_documents=((3, 1),), batch=1, q_length=5, dim=2, value_dim=3).tensors(
        torch.float64
    )
    attend, bias = LocalAttend(KERNEL), spec.bias
    assert bias is not None

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attend.with_lse(q, k, v, mask, replace(spec, bias=bias))
        return out, lse.clamp(min=-1e3)  # a difference of -inf is NaN

    inputs = [t.detach().requires_grad_() for t in (q, k, v, bias)]
    assert torch.autograd.gradcheck(function, inputs, check_undefined_grad=False)


def test_rows_that_see_nothing() -> None:
    case = Case(Band.causal(), 24, q_documents=PACKED, bias="matrix")
    t = case.tensors(torch.float32)
    got = results(LocalAttend(KERNEL).with_lse, t[:3], t.mask, t.spec, t.dout, t.dlse)
    assert not any(x.isnan().any() for x in got.values())
    assert (got["lse"][0, :, 23:] == -torch.inf).all()
    assert got["lse"][0, :, :23].isfinite().all()
    for name in ("out", "dq", "dk", "dv"):
        assert (got[name][0, 23:] == 0).all()
    # bands and -inf biases blind rows too
    beyond = AttentionMask(Band(100, None))
    got = results(LocalAttend(KERNEL).with_lse, t[:3], beyond, AttentionSpec(), t.dout, t.dlse)
    assert (got.pop("lse") == -torch.inf).all()
    assert not any(x.any() for x in got.values())
    bias = torch.zeros(24, 24).index_fill(0, torch.tensor([3]), -torch.inf)
    got = results(
        LocalAttend(KERNEL).with_lse, t[:3], AttentionMask(Band.causal()), AttentionSpec(bias=bias.requires_grad_()), t.dout
    )
    assert not any(x.isnan().any() for x in got.values())
    assert (got["out"][:, 3] == 0).all()


@pytest.mark.parametrize(("queries", "keys"), [(0, 4), (4, 0), (0, 0)])
def test_no_queries_or_no_keys(queries: int, keys: int) -> None:
    case = Case(Band.full(), queries, keys, heads=4, q_documents=((queries,), ()), k_documents=((keys,), ()))
    t = case.tensors(torch.float32)
    got = results(LocalAttend(KERNEL).with_lse, t[:3], t.mask, t.spec, t.dout, t.dlse)
    assert got["out"].shape == t.dout.shape
    assert (got["lse"] == -torch.inf).all()
    assert not got["out"].any()


def test_adds_to_what_it_is_given() -> None:
    """`into` equals merging by hand, and is returned; gradients add to what is there."""
    q, k, v, dout, _, _, spec = Case(Band.full(), 8, 12, heads=4, alibi=True).tensors(torch.bfloat16)
    part, block = Block(Band.full(), k_start=5), Block(Band.full(), k_start=5).narrow(0, 8, 5, 7)
    merged = empty_partial(q, 8)
    assert KERNEL.forward(q, k[:, :5], v[:, :5], part, spec, into=merged) is merged
    KERNEL.forward(q, k[:, 5:], v[:, 5:], block, spec, into=merged)
    whole = KERNEL.forward(q.double(), k.double(), v.double(), part, spec)
    torch.testing.assert_close(Partial(*(t.double() for t in merged)), whole, atol=1e-6, rtol=0)
    lse, delta = merged.lse, torch.zeros_like(merged.lse)
    into = zero_grads(q, k, v)
    assert KERNEL.backward(dout, q, k, v, lse, delta, part, spec, into=into) is into
    once = [g.clone() for g in into if g is not None]
    KERNEL.backward(dout, q, k, v, lse, delta, part, spec, into=into)
    for one, two in zip(once, into, strict=False):
        assert two is not None
        assert torch.equal(2 * one, two)
    plain = KERNEL.backward(dout, q, k, v, lse, delta, part, spec)
    assert plain.dq.dtype == torch.bfloat16
    assert torch.equal(plain.dq, once[0].bfloat16())


def test_positions_are_global() -> None:
    """A block that lies elsewhere sees the ALiBi and dropout of where it lies."""
    t = replace(EVERYTHING, band=Band.full(), q_documents=None, bias=None).tensors(torch.float64)
    whole = KERNEL.forward(t.q, t.k, t.v, Block(Band(None, None)), t.spec)
    rows = slice(3, 24, 3)
    striped = Block(Band.full(), q_start=3, k_start=0, stride=3)
    parts = empty_partial(t.q[:, rows], 5)
    for k0 in range(3):
        block = replace(striped, k_start=k0)
        KERNEL.forward(t.q[:, rows], t.k[:, k0::3], t.v[:, k0::3], block, t.spec, into=parts)
    torch.testing.assert_close(parts, Partial(whole.out[:, rows], whole.lse[:, :, rows]), rtol=0, atol=1e-12)


def test_autocast_does_not_reach_the_kernel() -> None:
    t = EVERYTHING.tensors(torch.float32)
    plain = results(LocalAttend(KERNEL).with_lse, t[:3], t.mask, t.spec, t.dout, t.dlse)
    with torch.autocast("cpu", torch.bfloat16):
        cast = results(LocalAttend(KERNEL).with_lse, t[:3], t.mask, t.spec, t.dout, t.dlse)
    assert all(torch.equal(plain[name], cast[name]) for name in plain)


def test_shapes_alone_on_the_meta_device() -> None:
    q = torch.empty(1, 4, 2, 8, device="meta")
    assert LocalAttend(KERNEL)(q, q, q[..., :3], AttentionMask(Band.causal())).shape == (1, 4, 2, 3)


def test_heads_must_divide() -> None:
    q, k = torch.randn(1, 4, 3, 2), torch.randn(1, 4, 2, 2)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        KERNEL.forward(q, k, k, Block(Band.full()), AttentionSpec())


def test_refuses_nothing() -> None:
    features = frozenset(("softcap", "alibi", "bias", "dropout"))
    assert KERNEL.refuses(Needs(frozenset(("band",)), True, features, 7, 5, torch.float64, "cpu", True)) == []


def test_only_some_inputs_want_gradients() -> None:
    t = EVERYTHING.tensors(torch.float64)
    whole = results(LocalAttend(KERNEL).with_lse, t[:3], t.mask, t.spec, t.dout)
    q = t.q.clone().requires_grad_()
    constant = replace(t.spec, bias=None if t.spec.bias is None else t.spec.bias.detach())
    out = LocalAttend(KERNEL)(q, t.k, t.v, t.mask, constant)
    out.backward(t.dout)
    assert q.grad is not None
    assert torch.equal(q.grad, whole["dq"])
    with torch.no_grad():
        assert not LocalAttend(KERNEL)(q, t.k, t.v, t.mask, t.spec).requires_grad


def test_a_bias_is_watched_and_freed_with_the_graph() -> None:
    """Changing the bias in place before the backward is an error, as for any saved tensor."""
    q = torch.randn(1, 4, 1, 2, requires_grad=True)
    bias = torch.zeros(4, 4, requires_grad=True)
    out = LocalAttend(KERNEL)(q, q, q, AttentionMask(Band.causal()), AttentionSpec(bias=bias))
    with torch.no_grad():
        bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        *(({"softcap": cap}, f"softcap {cap} must be above 0 and finite") for cap in (0.0, inf, nan)),
        *(({"scale": scale}, f"scale {scale} must be finite") for scale in (inf, -inf, nan)),
        ({"dropout": 1.0}, "must be in"),
        ({"dropout": 0.1}, "needs dropout_seed"),
        ({"dropout_seed": torch.zeros(2, dtype=torch.int32)}, "must be int64"),
        ({"alibi_slopes": torch.ones(2, requires_grad=True)}, "detach them"),
    ],
)
def test_specs_that_make_no_sense(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionSpec(**wrong)


def test_features() -> None:
    assert EVERYTHING.tensors(torch.float32).spec.features == {"softcap", "alibi", "bias", "dropout"}
    assert AttentionSpec().features == frozenset()
    assert not AttentionSpec(softcap=2.0, bias=torch.zeros(1)).positional
