from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longtrain.errors import DataError, KernelError
from longtrain.kernels.cross_entropy import Sizes
from longtrain.kernels.language import has_triton
from longtrain.kernels.linear_cross_entropy import LossSum, linear_cross_entropy
from tests.loss_cases import LossCase, by_definition, check_loss, with_sizes

interpreter = pytest.mark.skipif(torch.cuda.is_available() or not has_triton(), reason="needs Triton's interpreter")
versions = pytest.mark.parametrize("fused", [False, pytest.param(True, marks=interpreter)])
OPTIONS = [{"z_loss": 1e-2}, {"softcap": 3.0}, {"label_smoothing": 0.1}, {"z_loss": 1e-2, "softcap": 3.0, "label_smoothing": 0.1}]
PANELS = Sizes(columns=256, block=512, logits=256 * 20, memory=4 * 256 * 20 + 2**15)
"""The first panel keeps its scores in dW, some more don't, and blocks are cut into several products and programs."""


def inputs(n: int, c: int, v: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(n, c, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (torch.randn(v, c, dtype=torch.float64) / c**0.5).to(dtype).requires_grad_()
    labels = torch.randint(v, (n,))
    labels[::3] = -100
    return hidden, weight, labels


def truth(hidden: Tensor, weight: Tensor, labels: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in fp64."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = cross_entropy(h @ w.t(), labels, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss * factor, (h, w))


@pytest.mark.parametrize("n", [1, 2, 7, 8, 63, 111])
@pytest.mark.parametrize("chunk", [1, 8, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_cross_entropy(n: int, chunk: int, dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, labels = inputs(n, 16, 29, dtype)
    expected = truth(hidden, weight, labels, -0.3)
    loss, count = linear_cross_entropy(hidden, weight, labels, chunk=chunk)
    assert (count.dtype, count.item()) == (torch.int64, (labels != -100).sum().item())
    assert loss.dtype == dtype
    assert loss.shape == ()
    actual = loss.detach(), *torch.autograd.grad(loss * -0.3, (hidden, weight))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, atol=tolerance * max(1, n), rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_fp32_inside(dtype: torch.dtype) -> None:
    """Only the gradients' own rounding may show: logits and the accumulated weight gradient are fp32."""
    hidden, weight, labels = inputs(300, 32, 50, dtype)
    factor = 1 / 3
    expected = truth(hidden, weight, labels, factor)
    loss = linear_cross_entropy(hidden, weight, labels, chunk=7).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach().double(), expected[0], atol=0, rtol=1e-6)
    dx, dw = torch.autograd.grad(loss * factor, (hidden, weight))
    assert dx.dtype == dw.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(dx.double(), expected[1], atol=1e-6, rtol=1.1 * eps)
    torch.testing.assert_close(dw.double(), expected[2], atol=1e-5, rtol=0.6 * eps)


@versions
def test_autocast_rounds_nothing(fused: bool) -> None:
    case = LossCase(37, 16, 130)
    *tensors, labels = case.inputs(torch.float32)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = linear_cross_entropy(*tensors, labels, fused=fused).loss
        found.append((loss.detach(), *torch.autograd.grad(loss, tensors)))
    for plain, cast in zip(*found, strict=True):
        assert torch.equal(plain, cast)


def test_bf16_beside_a_master_weight_is_cast_by_the_caller() -> None:
    """Under autocast too; the gradient of the cast is in fp32."""
    hidden, weight, labels = inputs(5, 4, 7, torch.float32)
    low = hidden.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(KernelError, match=r"one dtype.*not torch\.bfloat16, torch\.float32"):
            linear_cross_entropy(low, weight, labels)
        loss = linear_cross_entropy(low, weight.to(low.dtype), labels).loss
    (dw,) = torch.autograd.grad(loss, weight)
    assert dw.dtype == torch.float32
    assert torch.equal(dw, dw.bfloat16().float())


def test_sums_above_the_range_of_fp16_survive_until_they_are_scaled() -> None:
    hidden = torch.full((2000, 4), 100.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(8, 4, dtype=torch.float16, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.zeros(2000, dtype=torch.int64), chunk=64).loss
    (loss / 2000).backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[0], torch.full((4,), -87.5, dtype=torch.float16))


def test_a_batch_without_labels_has_a_graph() -> None:
    hidden, weight, labels = inputs(9, 4, 5, torch.float32)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), chunk=4).loss
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))  # type: ignore[arg-type]
    assert torch.equal(weight.grad, torch.zeros_like(weight))  # type: ignore[arg-type]


def test_a_shard_without_tokens() -> None:
    hidden, weight, labels = inputs(0, 4, 5, torch.float32)
    loss = linear_cross_entropy(hidden, weight, labels).loss
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(weight.grad, torch.zeros_like(weight))  # type: ignore[arg-type]


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient(frozen: int) -> None:
    *tensors, labels = inputs(9, 4, 5)
    expected = truth(*tensors, labels, 1.0)
    tensors[frozen].requires_grad_(False)
    linear_cross_entropy(*tensors, labels, chunk=4).loss.backward()
    assert tensors[frozen].grad is None
    torch.testing.assert_close(tensors[1 - frozen].grad, expected[2 - frozen])


def test_gradcheck_of_both_inputs_at_once() -> None:
    hidden, weight, labels = inputs(5, 3, 4)
    for x in (hidden, weight):
        x.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, chunk=2).loss
    grads = torch.autograd.grad(loss, (hidden, weight))
    for x, grad in zip((hidden, weight), grads, strict=True):
        direction = torch.randn_like(x)
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                x += sign * 1e-6 * direction
                values.append(linear_cross_entropy(hidden, weight, labels, chunk=2).loss)
                x -= sign * 1e-6 * direction
        torch.testing.assert_close((grad * direction).sum(), (values[0] - values[1]) / 2e-6, atol=1e-7, rtol=1e-7)


def test_its_backward_runs_once() -> None:
    hidden, weight, labels = inputs(5, 3, 4)
    loss = linear_cross_entropy(hidden, weight, labels).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returned, and which operations returned one of the weight's shape."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


@pytest.mark.parametrize("grad", [True, False])
def test_logits_never_exist(grad: bool) -> None:
    hidden, weight, labels = inputs(512, 8, 300, torch.float32)
    with Largest() as largest, torch.set_grad_enabled(grad):
        loss = linear_cross_entropy(hidden, weight, labels, chunk=16).loss
        if grad:
            loss.backward()
    assert largest.elements <= max(16 * 300, weight.numel(), hidden.numel()) < 512 * 300 / 20


def test_no_gradients_are_computed_where_none_are_wanted() -> None:
    hidden, weight, labels = inputs(64, 100, 7, torch.float32)
    with Largest() as largest, torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels, chunk=4).loss
    assert not loss.requires_grad
    assert largest.elements <= weight.numel()


@versions
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_options_alone_and_combined(dtype: torch.dtype, options: dict[str, float], fused: bool) -> None:
    if not (fused and dtype == torch.float64):
        check_loss(LossCase(37, 16, 130, **options, scale=2.0), dtype, fused)


@versions
@pytest.mark.parametrize("far", [40.0, 110.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_labels_where_the_soft_cap_saturates(dtype: torch.dtype, far: float, fused: bool) -> None:
    """Their scores lie far below the maximum, and all of their gradient passes the slope of the soft-cap there."""
    check_loss(LossCase(16, 32, 200, softcap=30.0, ignored=0, far=far), dtype, fused)


@versions
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 7), (63, 1000), (111, 4097), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_odd_sizes(tokens: int, vocabulary: int, dtype: torch.dtype, fused: bool) -> None:
    check_loss(LossCase(tokens, 16, vocabulary, ignored=2 if tokens > 1 else 0), dtype, fused)


@interpreter
@pytest.mark.parametrize("sizes", [PANELS, Sizes(columns=128, block=256, logits=128 * 64), Sizes(tokens=17)])
@pytest.mark.parametrize(("hidden", "vocabulary"), [(8, 1111), (30, 7), (64, 520)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_panels_and_blocks(hidden: int, vocabulary: int, dtype: torch.dtype, sizes: Sizes) -> None:
    """Wherever scores are kept and however the vocabulary is cut, the sums are the same."""
    check_loss(LossCase(45, hidden, vocabulary, z_loss=1e-3, softcap=5.0, label_smoothing=0.1), dtype, True, sizes=sizes)


@interpreter
@pytest.mark.parametrize("factor", [1.0, -0.3])
def test_dw_is_rounded_once_in_its_own_memory(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longtrain.kernels.cross_entropy.SCALED", 100)
    case = LossCase(5, 24, 1000)
    tensors = case.inputs(torch.bfloat16)
    truth = by_definition(case, *tensors, factor)
    dw = with_sizes(case, *tensors, factor, Sizes(block=256))[2]
    assert dw.shape == (1000, 24)
    assert dw.is_contiguous()
    assert dw.untyped_storage().nbytes() < 1.1 * dw.numel() * 2
    torch.testing.assert_close(dw.double(), truth[2], atol=2e-3, rtol=2e-2)


@interpreter
@settings(max_examples=10)
@given(st.data())
def test_both_versions_are_the_definition(data: st.DataObject) -> None:
    draw = data.draw
    case = LossCase(
        draw(st.integers(1, 40)),
        draw(st.integers(1, 20)),
        draw(st.integers(1, 100)),
        draw(st.sampled_from([0.0, 1e-4, 0.1])),
        draw(st.sampled_from([None, 1.0, 30.0])),
        draw(st.sampled_from([0.0, 0.1, 0.9])),
        draw(st.integers(0, 4)),
        draw(st.sampled_from([0.1, 1.0, 10.0])),
    )
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    check_loss(case, dtype, False)
    check_loss(case, dtype, True)


@versions
def test_logits_of_any_size(fused: bool) -> None:
    """Far above what exponentials can hold, and far below the largest."""
    hidden = torch.tensor([[1.0], [-1.0], [1e-3]], requires_grad=True)
    weight = torch.tensor([[3e4], [-1e5], [0.0]], requires_grad=True)
    labels = torch.tensor([0, 1, 2])
    loss = linear_cross_entropy(hidden, weight, labels, fused=fused).loss
    dx, dw = torch.autograd.grad(loss, (hidden, weight))
    expected = by_definition(LossCase(3, 1, 3), hidden, weight, labels, 1.0)
    for actual, exact in zip((loss.detach(), dx, dw), expected, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-6)


@versions
@pytest.mark.parametrize("tokens", [0, 9])
def test_nothing_bears_loss(tokens: int, fused: bool) -> None:
    hidden, weight, labels = LossCase(tokens, 4, 300, ignored=1).inputs(torch.float32)
    result = linear_cross_entropy(hidden, weight, labels, z_loss=1.0, softcap=2.0, label_smoothing=0.5, fused=fused)
    assert isinstance(result, LossSum)
    assert (result.loss.item(), result.count.item()) == (0, 0)
    for x, gradient in zip((hidden, weight), torch.autograd.grad(result.loss, (hidden, weight)), strict=True):
        assert torch.equal(gradient, torch.zeros_like(x))


@interpreter
@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1)])
def test_fused_with_frozen_inputs(frozen: tuple[int, ...]) -> None:
    case = LossCase(50, 16, 700)
    *tensors, labels = case.inputs(torch.float32)
    expected = by_definition(case, *tensors, labels, 1.0)
    for i in frozen:
        tensors[i].requires_grad_(False)
    loss = linear_cross_entropy(*tensors, labels, fused=True).loss
    torch.testing.assert_close(loss.detach().double(), expected[0])
    assert loss.requires_grad == (len(frozen) == 1)
    if loss.requires_grad:
        loss.backward()
        torch.testing.assert_close(tensors[1 - frozen[0]].grad.double(), expected[2 - frozen[0]], atol=1e-5, rtol=1e-5)  # type: ignore[union-attr]


@versions
@pytest.mark.parametrize("label", [-1, 50, 2**40])
def test_a_label_outside_the_vocabulary_is_refused(label: int, fused: bool) -> None:
    hidden, weight, labels = LossCase(9, 4, 50).inputs(torch.float32)
    labels[4] = label
    with pytest.raises(DataError, match=f"label {label} is outside the vocabulary of 50"):
        linear_cross_entropy(hidden, weight, labels, fused=fused)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "takes hidden"),
        ({"labels": torch.zeros(9, dtype=torch.int32)}, "int64 labels"),
        ({"weight": torch.zeros(5, 3)}, "takes hidden"),
        ({"weight": torch.zeros(5, 4, dtype=torch.bfloat16)}, "of one dtype"),
        ({"z_loss": -1.0}, "z_loss must"),
        ({"z_loss": math.nan}, "z_loss must"),
        ({"z_loss": math.inf}, "z_loss must"),
        ({"softcap": 0.0}, r"softcap in \(0, inf\)"),
        ({"softcap": math.inf}, r"softcap in \(0, inf\)"),
        ({"softcap": math.nan}, r"softcap in \(0, inf\)"),
        ({"label_smoothing": 1.0}, "label_smoothing in"),
        ({"label_smoothing": math.nan}, "label_smoothing in"),
        *(({"chunk": chunk, "fused": fused}, f"chunk must be.*not {chunk}") for chunk in (-5, 0, 2.5) for fused in (False, True)),
        ({"hidden": torch.zeros(9, 4, dtype=torch.int32), "weight": torch.zeros(5, 4, dtype=torch.int32)}, "not in torch.int32"),
        ({"hidden": torch.zeros(9, 4).double(), "weight": torch.zeros(5, 4).double(), "fused": True}, "leave `loss` out"),
    ],
)
def test_what_cannot_be_served_is_refused(change: dict, message: str) -> None:
    given = {"hidden": torch.zeros(9, 4), "weight": torch.zeros(5, 4), "labels": torch.zeros(9, dtype=torch.int64)} | change
    with pytest.raises(KernelError, match=message):
        linear_cross_entropy(**given)


@versions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_into_one_graph(dtype: torch.dtype, fused: bool) -> None:
    case = LossCase(20, 8, 600, z_loss=1e-3, softcap=4.0, label_smoothing=0.1)
    tensors = case.inputs(dtype)

    def step(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        loss, count = linear_cross_entropy(hidden * 1.5, weight, labels, fused=fused, **case.options)  # type: ignore[arg-type]
        return loss / count

    expected = step(*tensors)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(*tensors)
    assert torch.equal(found, expected)
    gradients = (torch.autograd.grad(x, tensors[:2]) for x in (found, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@versions
def test_the_operator_is_what_it_says(fused: bool) -> None:
    hidden, weight, labels = LossCase(7, 4, 600).inputs(torch.float32)
    operator = torch.ops.longtrain.linear_cross_entropy.default
    arguments = (hidden, weight, labels, 0.1, 3.0, 0.1, fused, 0, True, True)
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


@interpreter
def test_fused_logits_never_exist() -> None:
    hidden, weight, labels = LossCase(512, 8, 300).inputs(torch.float32)
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, labels, chunk=16, fused=True).loss.backward()
    # the interpreter copies bytes
    assert largest.elements <= 4 * max(16 * 320, weight.numel(), hidden.numel()) < 4 * 512 * 300 / 20


@pytest.mark.skipif(shutil.which("ptxas") is None and not has_triton(), reason="no ptxas to compile with")
def test_compiles_for_hopper_without_spilling() -> None:
    """With 16-byte loads and stores, also where the vocabulary is odd."""
    command = [sys.executable, "-m", "tests.kernels.offline_loss", "256", "64", "50257", "bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"}, timeout=250)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in kernels} == {"scores_kernel", "dlogits_kernel", "scale_kernel"}
    for kernel in kernels:
        assert (kernel["spilled"], kernel["stack"]) == (0, 0), kernel
        assert min(kernel["global"]["ld 128"], kernel["global"]["st 128"]) >= 4, kernel
