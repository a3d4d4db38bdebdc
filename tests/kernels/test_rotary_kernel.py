"""Rotary positions in Triton's interpreter; tests/kernels/test_layers_gpu.py runs them for real."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longtrain.errors import KernelError
from longtrain.kernels import plain, rotary
from longtrain.kernels.language import has_triton, interprets
from tests.layer_cases import check_rotary, outputs_and_gradients, tables

pytestmark = [
    pytest.mark.skipif(not has_triton(), reason="Triton is not installed"),
    pytest.mark.skipif(has_triton() and not interprets(), reason="Triton compiles here: test_layers_gpu.py runs instead"),
]
# batch, length, heads, key heads, features, turned features
SHAPES = (
    (1, 1, 1, 1, 2, 2),
    (2, 63, 4, 2, 16, 16),
    (1, 111, 3, 1, 10, 6),
    (1, 5, 40, 5, 128, 128),
    (2, 4, 2, 2, 111, 110),
    (1, 4097, 1, 1, 4, 2),
    (1, 3, 2, 1, 8, 0),
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape: tuple[int, ...]) -> None:
    check_rotary(*shape, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    check_rotary(2, 63, 6, 2, 20, 12, dtype)


@settings(max_examples=10)
@given(st.integers(1, 2), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.integers(1, 20), st.integers(0, 10))
def test_any_shape(batch: int, length: int, group: int, kv_heads: int, dim: int, half: int) -> None:
    check_rotary(batch, length, group * kv_heads, kv_heads, dim, 2 * min(half, dim // 2), torch.float32)


def test_is_the_rotation_as_written_bit_for_bit() -> None:
    """plain.rotary in fp32: x1 cos - x2 sin, x2 cos + x1 sin; tables of positions in any order."""
    cos, sin = tables(2, 9, 16)
    q, k = torch.randn(2, 9, 4, 16), torch.randn(2, 9, 2, 16)
    for x, out in zip((q, k), plain.rotary(q, k, cos, sin), strict=True):
        assert torch.equal(out, torch.cat((x[..., :8] * cos - x[..., 8:] * sin, x[..., 8:] * cos + x[..., :8] * sin), -1))
    torch.testing.assert_close(rotary.rotary(q, k, cos, sin), plain.rotary(q, k, cos, sin))


def test_leaves_its_inputs_alone_and_keeps_the_tables_only() -> None:
    q, k = torch.randn(1, 5, 2, 8, requires_grad=True), torch.randn(1, 5, 2, 8, requires_grad=True)
    cos, sin = tables(1, 5, 8)
    before, kept = (q.detach().clone(), k.detach().clone()), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        rotary.rotary(q, k, cos, sin)
    assert kept == [cos.data_ptr(), sin.data_ptr()]
    assert torch.equal(q, before[0])
    assert torch.equal(k, before[1])


def test_tables_shared_by_the_batch_and_any_layout() -> None:
    q, k = torch.randn(3, 2, 7, 8).transpose(1, 2), torch.randn(3, 7, 8, 1).transpose(2, 3)
    fixed = tuple(x.expand(3, -1, -1, -1) for x in tables(1, 7, 8))
    cotangents = [torch.ones(1).expand(x.shape) for x in (q, k)]
    one = tables(1, 7, 8)
    results = [outputs_and_gradients(f, [q, k], x, cotangents) for f in (rotary.rotary, plain.rotary) for x in (fixed, one)]
    for found in results[1:]:
        torch.testing.assert_close(found, results[0])


def test_no_positions() -> None:
    q = torch.empty(2, 0, 4, 8)
    assert rotary.rotary(q, q, *tables(2, 0, 8))[0].shape == q.shape


def test_compiles_without_a_graph_break() -> None:
    q, k = torch.randn(1, 5, 4, 8), torch.randn(1, 5, 2, 8)
    cos, sin = tables(1, 5, 8)

    def model(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = rotary.rotary(2 * q, 2 * k, cos, sin)
        return a.square(), b.square()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(outputs_and_gradients(f, [q, k], (), [q, k]) for f in (compiled, model)))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.longtrain.rotary.default, (q, k, cos, sin, False), test_utils=checks)


def test_refusals() -> None:
    q = torch.randn(1, 5, 2, 8)
    cos, sin = tables(1, 5, 8)
    with pytest.raises(KernelError, match="no gradient of cos and sin"):
        rotary.rotary(q, q, cos.requires_grad_(), sin)
    cos, sin = tables(2, 5, 8)
    for wrong in (
        (q, q[:, :4], cos[:1], sin[:1]),
        (q, q, cos, sin),
        (q, q, cos[:1], sin),
        (q, q, cos[:1, :1], sin[:1, :1]),
        (q, q[..., :6], cos[:1], sin[:1]),
        (q[0], q[0], cos[:1], sin[:1]),
        (q[..., :6], q[..., :6], cos[:1], sin[:1]),
    ):
        for layer in (rotary.rotary, plain.rotary):
            with pytest.raises(KernelError, match=r"^rotary: q, k, cos, sin are .* \[B, T, H, D\].*\[B or 1, T, 1, R/2\]"):
                layer(*wrong)
    with pytest.raises(KernelError, match=r"q and k are torch\.float64 and torch\.float64, not fp16, bf16 or fp32"):
        rotary.rotary(q.double(), q.double(), *tables(1, 5, 8))
