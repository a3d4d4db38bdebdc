"""The fused layers on a GPU: real sizes, every dtype, offsets beyond 32 bits, equal bits, compiled graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longtrain.kernels import gated, norms, plain, rotary
from tests.layer_cases import EPS, NORMS, check_gated, check_norm, check_rotary, outputs_and_gradients, tables

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = 2**31 // 4096 + 5
"""Rows of 4096 features that pass 2^31 elements."""


@pytest.fixture(autouse=True)
def _free() -> None:
    torch.cuda.empty_cache()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(
    "shape", [(1, 7), (63, 111), (2, 3, 64), (4097, 5), (111, 4096), (300, 5120), (67, 8192), (40, 12288), (33, 16384)], ids=str
)
def test_norms(shape: tuple[int, ...], name: str, dtype: torch.dtype) -> None:
    check_norm(name, shape, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_norms_of_many_tokens(name: str, dtype: torch.dtype) -> None:
    check_norm(name, (2, 8192, 4096), dtype, "cuda", poison=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 2, 2),
        (2, 63, 4, 2, 64, 64),
        (1, 4097, 3, 1, 10, 6),
        (2, 4, 2, 2, 111, 110),
        (1, 111, 71, 1, 64, 64),
        (1, 300, 128, 8, 256, 256),
        (1, 300, 32, 32, 80, 32),
        (1, 300, 8, 8, 128, 0),
        (2, 8192, 32, 8, 128, 128),
    ],
    ids=str,
)
def test_rotary(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_rotary(*shape, dtype, "cuda", poison=shape[1] < 8192)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("activation", plain.ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1,), (63, 111), (4097, 3), (2, 1024, 11008)], ids=str)
def test_gated(shape: tuple[int, ...], activation: str, joint: bool, dtype: torch.dtype) -> None:
    check_gated(shape, activation, dtype, "cuda", joint)


def same_tail(layer: object, wide: list[Tensor], fixed: tuple[object, ...], last: int) -> None:
    """The last rows of a tensor beyond 2^31 elements are what they are alone, outputs and gradients."""
    assert callable(layer)
    tails = [x[-last:].clone() for x in wide]
    whole = outputs_and_gradients(layer, wide, fixed, [wide[0]] * (2 if layer is norms.add_rms_norm else 1))
    alone = outputs_and_gradients(layer, tails, fixed, [tails[0]] * (2 if layer is norms.add_rms_norm else 1))
    for name, value in alone.items():
        assert torch.equal(whole[name][-last:], value), name


def test_norms_beyond_32_bits() -> None:
    wide = [torch.randn(ROWS, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    weight = torch.rand(4096, device="cuda", dtype=torch.bfloat16)
    same_tail(norms.add_rms_norm, wide, (weight, EPS), 3)


@pytest.mark.parametrize("joint", [False, True])
def test_gated_beyond_32_bits(joint: bool) -> None:
    if joint:
        wide = list(torch.randn(ROWS, 8192, device="cuda", dtype=torch.bfloat16).chunk(2, -1))
    else:
        wide = [torch.randn(ROWS, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    same_tail(gated.gated, wide, ("silu",), 3)


def test_rotary_beyond_32_bits() -> None:
    q = torch.randn(1, ROWS, 32, 128, device="cuda", dtype=torch.bfloat16)
    cos, sin = tables(1, ROWS, 128, "cuda")
    out, k_out = rotary.rotary(q, q[:, :, :1], cos, sin)
    expected, k_expected = rotary.rotary(q[:, -3:], q[:, -3:, :1], cos[:, -3:], sin[:, -3:])
    assert torch.equal(out[:, -3:], expected)
    assert torch.equal(k_out[:, -3:], k_expected)


def test_rotary_tables_shared_by_the_batch() -> None:
    q = torch.randn(3, 300, 32, 128, device="cuda", dtype=torch.bfloat16)
    one = tables(1, 300, 128, "cuda")
    each = [x.expand(3, -1, -1, -1).contiguous() for x in one]
    shared, apart = (outputs_and_gradients(rotary.rotary, [q, q[:, :, :8]], fixed, [q, q[:, :, :8]]) for fixed in (one, each))
    for name, value in shared.items():
        assert torch.equal(value, apart[name]), name


@pytest.mark.parametrize("name", NORMS)
def test_two_runs_are_the_same_bits(name: str) -> None:
    inputs = [torch.randn(5000, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(1 + name.startswith("add"))]
    weights = [torch.randn(4096, device="cuda", dtype=torch.bfloat16) for _ in range(1 + name.endswith("layer_norm"))]
    runs = [outputs_and_gradients(getattr(norms, name), inputs + weights, (EPS,), inputs) for _ in range(2)]
    for key, value in runs[0].items():
        assert torch.equal(value, runs[1][key]), key


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic: bool) -> None:
    cos, sin = tables(1, 64, 32, "cuda")

    def model(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, total = norms.add_rms_norm(x, branch, weight, EPS)
        q, k = rotary.rotary((2 * y).unflatten(-1, (4, 32)), total.unflatten(-1, (4, 32)), cos, sin)
        z, total = norms.add_layer_norm(total, (q * k).flatten(2), weight, bias, EPS)
        return norms.rms_norm(gated.gated(z, total, "gelu_tanh"), weight, EPS) + norms.layer_norm(z, weight, bias, EPS)

    x, branch = (torch.randn(1, 64, 128, device="cuda") for _ in range(2))
    inputs = [x, branch, *(torch.rand(128, device="cuda") for _ in range(2))]
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    fast, slow = (outputs_and_gradients(f, inputs, (), [x]) for f in (compiled, model))
    torch.testing.assert_close(fast, slow, atol=2e-4, rtol=1e-4)
