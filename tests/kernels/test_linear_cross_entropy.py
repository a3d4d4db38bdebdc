from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longtrain.kernels.linear_cross_entropy import linear_cross_entropy


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
    loss = linear_cross_entropy(hidden, weight, labels, chunk=chunk)
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
    loss = linear_cross_entropy(hidden, weight, labels, chunk=7)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach().double(), expected[0], atol=0, rtol=1e-6)
    dx, dw = torch.autograd.grad(loss * factor, (hidden, weight))
    assert dx.dtype == dw.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(dx.double(), expected[1], atol=1e-6, rtol=1.1 * eps)
    torch.testing.assert_close(dw.double(), expected[2], atol=1e-5, rtol=0.6 * eps)


def test_sums_above_the_range_of_fp16_survive_until_they_are_scaled() -> None:
    hidden = torch.full((2000, 4), 100.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(8, 4, dtype=torch.float16, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.zeros(2000, dtype=torch.int64), chunk=64)
    (loss / 2000).backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[0], torch.full((4,), -87.5, dtype=torch.float16))


def test_a_batch_without_labels_has_a_graph() -> None:
    hidden, weight, labels = inputs(9, 4, 5, torch.float32)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), chunk=4)
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))  # type: ignore[arg-type]
    assert torch.equal(weight.grad, torch.zeros_like(weight))  # type: ignore[arg-type]


def test_a_shard_without_tokens() -> None:
    hidden, weight, labels = inputs(0, 4, 5, torch.float32)
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(weight.grad, torch.zeros_like(weight))  # type: ignore[arg-type]


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient(frozen: int) -> None:
    *tensors, labels = inputs(9, 4, 5)
    expected = truth(*tensors, labels, 1.0)
    tensors[frozen].requires_grad_(False)
    linear_cross_entropy(*tensors, labels, chunk=4).backward()
    assert tensors[frozen].grad is None
    torch.testing.assert_close(tensors[1 - frozen].grad, expected[2 - frozen])


def test_gradcheck_of_both_inputs_at_once() -> None:
    hidden, weight, labels = inputs(5, 3, 4)
    for x in (hidden, weight):
        x.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, chunk=2)
    grads = torch.autograd.grad(loss, (hidden, weight))
    for x, grad in zip((hidden, weight), grads, strict=True):
        direction = torch.randn_like(x)
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                x += sign * 1e-6 * direction
                values.append(linear_cross_entropy(hidden, weight, labels, chunk=2))
                x -= sign * 1e-6 * direction
        torch.testing.assert_close((grad * direction).sum(), (values[0] - values[1]) / 2e-6, atol=1e-7, rtol=1e-7)


def test_its_backward_runs_once() -> None:
    hidden, weight, labels = inputs(5, 3, 4)
    loss = linear_cross_entropy(hidden, weight, labels)
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
        loss = linear_cross_entropy(hidden, weight, labels, chunk=16)
        if grad:
            loss.backward()
    assert largest.elements <= max(16 * 300, weight.numel(), hidden.numel()) < 512 * 300 / 20


def test_no_gradients_are_computed_where_none_are_wanted() -> None:
    hidden, weight, labels = inputs(64, 100, 7, torch.float32)
    with Largest() as largest, torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels, chunk=4)
    assert not loss.requires_grad
    assert largest.elements <= weight.numel()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    """There low-precision products have fp32 results without fp32 copies of the inputs."""
    hidden, weight, labels = (x.detach().cuda() for x in inputs(3000, 256, 4000, dtype))
    hidden.requires_grad_()
    weight.requires_grad_()
    expected = truth(hidden, weight, labels, 1 / 3)
    loss = linear_cross_entropy(hidden, weight, labels, chunk=700)
    torch.testing.assert_close(loss.detach().double(), expected[0], atol=0, rtol=1e-5)
    for actual, exact in zip(torch.autograd.grad(loss / 3, (hidden, weight)), expected[1:], strict=True):
        # probabilities are rounded to the inputs' dtype before the products, as the gradient of logits would be
        error = (actual.double() - exact).norm() / exact.norm()
        assert error < max(torch.finfo(dtype).eps, 1e-5)
