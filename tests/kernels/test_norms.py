"""Norms in Triton's interpreter; tests/kernels/test_layers_gpu.py runs them for real."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longtrain.errors import KernelError
from longtrain.kernels import norms, plain
from longtrain.kernels.language import has_triton, interprets
from tests.layer_cases import EPS, NORMS, check_norm, outputs_and_gradients

pytestmark = [
    pytest.mark.skipif(not has_triton(), reason="Triton is not installed"),
    pytest.mark.skipif(has_triton() and not interprets(), reason="Triton compiles here: test_layers_gpu.py runs instead"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:overflow encountered:RuntimeWarning"),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((16,), (1, 1), (63, 111), (2, 3, 64), (1, 5120), (4097, 5))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_every_shape(name: str, shape: tuple[int, ...]) -> None:
    check_norm(name, shape, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    check_norm(name, (63, 111), dtype)


@pytest.mark.parametrize("name", NORMS)
def test_rows_of_many_programs(name: str) -> None:
    """More tiles than programs, and partial sums of several programs."""
    check_norm(name, (40, 2000), torch.float32, poison=False)


@settings(max_examples=12)
@given(
    st.sampled_from(NORMS), st.lists(st.integers(1, 5), max_size=2), st.integers(1, 70), st.sampled_from(DTYPES), st.integers(0, 9)
)
def test_any_shape(name: str, leading: list[int], width: int, dtype: torch.dtype, seed: int) -> None:
    check_norm(name, (*leading, width), dtype, seed=seed)


def inputs(rows: int = 6, width: int = 24) -> list[Tensor]:
    """x, branch, weight, bias."""
    return [torch.randn(rows, width, requires_grad=True) for _ in range(2)] + [
        torch.randn(width, requires_grad=True) for _ in range(2)
    ]


def test_no_rows() -> None:
    x, branch, weight, bias = inputs(0)
    y, total = norms.add_layer_norm(x, branch, weight, bias, EPS)
    (y.sum() + total.sum()).backward()
    assert y.shape == total.shape == (0, 24)
    assert weight.grad is not None
    assert not weight.grad.any()
    assert norms.rms_norm(torch.empty(3, 0, 24), weight, EPS).shape == (3, 0, 24)


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_output_only(used: int) -> None:
    found = []
    for layer in (norms.add_layer_norm, plain.add_layer_norm):
        torch.manual_seed(1)
        x, branch, weight, bias = inputs()
        layer(x, branch, weight, bias, EPS)[used].square().sum().backward()
        found.append([x.grad, branch.grad, weight.grad, bias.grad])
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


def test_a_frozen_weight_costs_no_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, weight, _ = inputs()
    monkeypatch.setattr(norms, "sum_kernel", None)
    y = norms.rms_norm(x, weight.detach(), EPS)
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), x), torch.autograd.grad(plain.rms_norm(x, weight, EPS).sum(), x), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_another_dtype(dtype: torch.dtype) -> None:
    x, branch, weight, _ = inputs()
    cotangents = [torch.randn(6, 24) for _ in range(2)]
    arguments = ([x.to(dtype), branch.to(dtype), weight], (EPS,), cotangents)
    fast, slow = (outputs_and_gradients(layer, *arguments) for layer in (norms.add_rms_norm, plain.add_rms_norm))
    for name, value in fast.items():
        assert value.dtype == slow[name].dtype
        torch.testing.assert_close(value, slow[name], atol=4e-2, rtol=2e-2)


def test_layer_norm_without_bias() -> None:
    x, _, weight, _ = inputs()
    fast, slow = (outputs_and_gradients(layer, [x, weight], (None, EPS), [x]) for layer in (norms.layer_norm, plain.layer_norm))
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)


def test_rows_wider_than_registers_allow_sums_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "NARROW", 16)
    check_norm("add_layer_norm", (9, 24), torch.float16)


def test_any_strides() -> None:
    x, _, weight, bias = inputs()
    every = torch.randn(24, 6).t()
    for layer, other in ((norms.layer_norm, plain.layer_norm),):
        fast, slow = (outputs_and_gradients(f, [every, weight, bias], (EPS,), [x[:1].expand(6, 24)]) for f in (layer, other))
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)


def test_keeps_the_sum_and_a_number_a_row() -> None:
    x, branch, weight, bias = inputs()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _, total = norms.add_layer_norm(x, branch, weight, bias, EPS)
    assert [t.shape for t in kept] == [total.shape, weight.shape, (12,)]
    assert kept[0].data_ptr() == total.data_ptr()


@pytest.mark.parametrize("name", NORMS)
def test_compiles_without_a_graph_break(name: str) -> None:
    x, branch, weight, bias = inputs()
    arguments = [x, *([branch] if name.startswith("add") else []), weight, *([bias] if name.endswith("layer_norm") else [])]
    layer = getattr(norms, name)

    def model(*inputs: Tensor) -> Tensor:
        out = layer(*(2 * x for x in inputs), EPS)
        return sum(y.square() for y in out) if isinstance(out, tuple) else out.square()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    fast, slow = (outputs_and_gradients(f, arguments, (), [x]) for f in (compiled, model))
    torch.testing.assert_close(fast, slow)


def test_operators_keep_their_contracts() -> None:
    x, branch, weight, bias = inputs()
    ops, checks = torch.ops.longtrain, ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.norm.default, (x, weight, bias, EPS, True), test_utils=checks)
    torch.library.opcheck(ops.add_norm.default, (x, branch, weight, None, EPS, False), test_utils=checks)
    stats, detached = torch.rand(6), (x.detach(), weight.detach())
    for sums in (0, 1):
        torch.library.opcheck(ops.norm_backward.default, (x.detach(), None, *detached, stats, False, sums), test_utils=checks[:2])


def test_refusals() -> None:
    x, branch, weight, _ = inputs()
    with pytest.raises(KernelError, match=r"not in torch\.float64"):
        norms.rms_norm(x.double(), weight, EPS)
    with pytest.raises(KernelError, match="one weight a feature"):
        norms.rms_norm(x, weight[:-1], EPS)
    with pytest.raises(KernelError, match="must be of one shape"):
        norms.add_rms_norm(x, branch[:1], weight, EPS)
    with pytest.raises(KernelError, match=r"not in torch\.int64"):
        norms.rms_norm(x, weight.long(), EPS)
    with pytest.raises(KernelError, match=r"not in torch\.float64"):
        norms.add_rms_norm(x, branch.double(), weight, EPS)


@pytest.mark.parametrize("wrong", [torch.zeros(1), torch.zeros(23), torch.zeros(48), torch.zeros(24, dtype=torch.bfloat16)])
def test_a_bias_that_does_not_belong_to_the_weight(wrong: Tensor) -> None:
    """A shorter one would be read beyond its end."""
    x, branch, weight, _ = inputs()
    with pytest.raises(KernelError, match=r"weight \(24,\) torch\.float32, bias .* one shape and dtype"):
        norms.layer_norm(x, weight, wrong, EPS)
    with pytest.raises(KernelError, match="one shape and dtype"):
        norms.add_layer_norm(x, branch, weight, wrong, EPS)


class Launches:
    """Stands for a kernel and keeps what it is launched with."""

    def __init__(self) -> None:
        self.arguments: tuple[object, ...] = ()

    def __getitem__(self, grid: tuple[int, ...]) -> Launches:
        return self

    def __call__(self, *arguments: object, **constants: object) -> None:
        self.arguments = arguments


@pytest.mark.parametrize(("stride", "taken"), [(2**19, 2**19), (2**20, 1), (2**23, 1)])
def test_offsets_in_a_tile_fit_32_bits(stride: int, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """2048 rows of one feature are one tile; rows that lie farther apart are copied. On a device without memory."""
    forward, backward = Launches(), Launches()
    for name, kernel in (("forward_kernel", forward), ("backward_kernel", backward), ("sum_kernel", Launches())):
        monkeypatch.setattr(norms, name, kernel)
    x, weight = torch.empty_strided((4096, 1), (stride, 1), device="meta"), torch.empty(1, device="meta")
    _, _, stats = norms._forward(x, x, weight, None, EPS, False)
    norms._backward_launch(x, x, x, weight, stats, False, 1)
    assert forward.arguments[7:9] == (taken, taken)
    assert backward.arguments[7:10] == (taken, taken, taken)
