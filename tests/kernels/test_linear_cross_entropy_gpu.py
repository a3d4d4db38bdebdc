"""The loss without logits on a GPU: every option and dtype, real vocabularies, memory, equal bits, offsets beyond 32 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longtrain.kernels.cross_entropy import SIZES, Sizes
from longtrain.kernels.linear_cross_entropy import linear_cross_entropy
from tests.loss_cases import LossCase, by_definition, check_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EVERYTHING = {"z_loss": 1e-4, "softcap": 30.0, "label_smoothing": 0.1}
GIB = 2**30


@pytest.fixture(autouse=True)
def _free() -> None:
    torch.cuda.empty_cache()
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("options", [{}, *({name: value} for name, value in EVERYTHING.items()), EVERYTHING], ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES)
def test_options(dtype: torch.dtype, options: dict[str, float], fused: bool) -> None:
    check_loss(LossCase(3000, 256, 4097, **options, scale=3.0), dtype, fused, "cuda")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("far", [40.0, 70.0, 110.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_labels_where_the_soft_cap_saturates(dtype: torch.dtype, far: float, fused: bool) -> None:
    check_loss(LossCase(500, 256, 4097, softcap=30.0, ignored=5, far=far), dtype, fused, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 63, 111, 4097])
@pytest.mark.parametrize("vocabulary", [1, 7, 257, 1000, 32000, 50257])
def test_odd_sizes(tokens: int, vocabulary: int, dtype: torch.dtype) -> None:
    check_loss(LossCase(tokens, 128, vocabulary, ignored=0 if tokens == 1 else 5), dtype, True, "cuda")


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(columns=1024, warps=4, block=2**13),
        Sizes(columns=2048, warps=4, block=2**14, logits=2**21, memory=2**26),
        Sizes(columns=8192, warps=8, block=2**13),
        Sizes(columns=16384, warps=16),
        Sizes(tokens=256),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sizes(sizes: Sizes, dtype: torch.dtype) -> None:
    check_loss(LossCase(1500, 512, 20001, **EVERYTHING), dtype, True, "cuda", sizes=sizes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(2048, 131072), (1024, 262144), (1111, 128256)])
def test_real_vocabularies(tokens: int, vocabulary: int, dtype: torch.dtype) -> None:
    check_loss(LossCase(tokens, 1024, vocabulary, z_loss=1e-4), dtype, True, "cuda")


def test_a_weight_of_more_than_2_31_elements() -> None:
    """Vocabulary 264000 x hidden 8192, against the version in torch, whose offsets are torch's."""
    if torch.cuda.mem_get_info()[0] < 40 * GIB:
        pytest.skip("needs 40 GiB")
    case = LossCase(300, 8192, 264000, z_loss=1e-4)
    hidden = torch.randn(case.tokens, case.hidden, device="cuda").bfloat16().requires_grad_()
    weight = torch.empty(case.vocabulary, case.hidden, device="cuda", dtype=torch.bfloat16).normal_(std=1 / 90).requires_grad_()
    labels = torch.randint(case.vocabulary - 1000, case.vocabulary, (case.tokens,), device="cuda")
    found = []
    for fused in (True, False):
        loss = linear_cross_entropy(hidden, weight, labels, z_loss=1e-4, fused=fused).loss
        found.append((loss.detach(), *torch.autograd.grad(loss / 3, (hidden, weight))))
        torch.cuda.empty_cache()
    (loss, dx, dw), (plain_loss, plain_dx, plain_dw) = found
    torch.testing.assert_close(loss, plain_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(dx, plain_dx, rtol=2e-2, atol=1e-2 * plain_dx.abs().max().item())
    for rows in (slice(0, 1000), slice(131000, 133000), slice(-2000, None)):
        a, b = dw[rows].float(), plain_dw[rows].float()
        assert (a - b).norm() < 1e-2 * b.norm()


@pytest.mark.parametrize(
    ("tokens", "hidden", "vocabulary"),
    [(8192, 4096, 131072), (16384, 4096, 131072), (32768, 4096, 32768), (8192, 4096, 262144), (8192, 2048, 50257)],
)
def test_memory(tokens: int, hidden: int, vocabulary: int) -> None:
    """Forward and backward take less than 1 GiB besides dx and one fp32 dW, and leave dx and a dW of the weight's dtype."""
    if torch.cuda.mem_get_info()[0] < 6 * hidden * vocabulary + 4 * GIB:
        pytest.skip("needs more memory")
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.empty(vocabulary, hidden, device="cuda", dtype=torch.bfloat16).normal_(std=hidden**-0.5).requires_grad_()
    y = torch.randint(vocabulary, (tokens,), device="cuda")
    linear_cross_entropy(x[:8], w[:512], y[:8] % 512, fused=True).loss.backward()  # cuBLAS' workspace
    x.grad = w.grad = None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = linear_cross_entropy(x, w, y, fused=True).loss
    (loss / tokens).backward()
    extra = torch.cuda.max_memory_allocated() - before - 2 * x.numel() - 4 * w.numel()
    assert extra < GIB, f"{extra / GIB:.3f} GiB"
    left = torch.cuda.memory_allocated() - before
    assert left < 1.05 * 2 * (x.numel() + w.numel()) + 2**20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_two_runs_are_equal_bit_for_bit(dtype: torch.dtype) -> None:
    inputs = LossCase(5000, 1024, 33333, **EVERYTHING).inputs(dtype, "cuda")

    def run() -> tuple[Tensor, ...]:
        loss = linear_cross_entropy(*inputs, **EVERYTHING, fused=True).loss
        return loss.detach(), *torch.autograd.grad(loss * 0.3, inputs[:2])

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_compiles_into_one_graph(fused: bool) -> None:
    hidden, weight, labels = LossCase(1000, 256, 5000).inputs(torch.bfloat16, "cuda")

    def step(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        loss, count = linear_cross_entropy(torch.nn.functional.silu(hidden), weight, labels, **EVERYTHING, fused=fused)
        return loss / count

    expected, found = step(hidden, weight, labels), torch.compile(step, fullgraph=True)(hidden, weight, labels)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    gradients = (torch.autograd.grad(x, (hidden, weight)) for x in (found, expected))
    for a, b in zip(*gradients, strict=True):
        assert (a.float() - b.float()).norm() < 1e-2 * b.float().norm()


@pytest.mark.parametrize("fused", [False, True])
def test_a_label_outside_the_vocabulary_makes_the_loss_nan(fused: bool) -> None:
    hidden, weight, labels = LossCase(100, 64, 1000).inputs(torch.bfloat16, "cuda")
    assert linear_cross_entropy(hidden, weight, labels, fused=fused).loss.isfinite()
    labels[1] = 1000
    assert linear_cross_entropy(hidden, weight, labels, fused=fused).loss.isnan()


def test_the_host_never_waits_for_the_device() -> None:
    hidden, weight, labels = LossCase(1000, 64, 1000).inputs(torch.bfloat16, "cuda")
    linear_cross_entropy(hidden, weight, labels, **EVERYTHING, fused=True).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(hidden, weight, labels, **EVERYTHING, fused=True).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_inputs_that_are_not_contiguous() -> None:
    hidden, weight, labels = LossCase(200, 96, 1000).inputs(torch.float32, "cuda")
    padded = (torch.nn.functional.pad(x.detach(), (0, 5))[:, :96].requires_grad_() for x in (hidden, weight))
    case, (x, w) = LossCase(200, 96, 1000), padded
    loss = linear_cross_entropy(x, w, labels, fused=True).loss
    expected = by_definition(case, x, w, labels, 1.0)
    for actual, exact in zip((loss.detach(), *torch.autograd.grad(loss, (x, w))), expected, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-4, atol=1e-4)


def test_the_default_sizes_leave_room() -> None:
    assert SIZES.memory < GIB
