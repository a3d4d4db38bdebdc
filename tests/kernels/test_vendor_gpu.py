"""cuDNN and FlashAttention-2 behind the primitive, on a GPU: torch's real operators, on one device and in a ring."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longtrain.attention import AttentionKernel, Band, Needs, SequenceLayout
from longtrain.attention.reference import ReferenceKernel
from longtrain.kernels.local import LocalAttend
from longtrain.kernels.vendor import CudnnKernel, FlashAttention2Kernel
from longtrain.parallel.ring import RingAttend
from tests.attention_cases import Case, check_kernel
from tests.parity import assert_close_to_truth, naive_attention, results
from tests.ring_threads import ThreadExchange, run_ring

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
DTYPES = (torch.bfloat16, torch.float16)
FLASH, CUDNN = FlashAttention2Kernel(), CudnnKernel()
CAUSAL, FULL = Band.causal(), Band.full()

BOTH = (
    Case(CAUSAL, 512, None, 2, 4, 4, 64),
    Case(FULL, 512, None, 2, 4, 2, 128),
    Case(CAUSAL, 601, None, 1, 8, 2, 128, scale=0.05),
    Case(FULL, 63, 111, 2, 4, 1, 64),
    Case(FULL, 111, 63, 1, 2, 2, 80),
    Case(CAUSAL, 300, 77, 1, 4, 2, 64),
    Case(CAUSAL, 77, 300, 1, 4, 2, 64),
    Case(CAUSAL, 130, None, 1, 2, 2, 32, sinks=True),
    Case(Band(1, None), 257, None, 1, 4, 2, 64),
    Case(FULL, 1, 64, 1, 2, 2, 64),
)
FLASH_ONLY = (
    Case(CAUSAL, 1, None, 1, 2, 1, 64),
    Case(FULL, 200, 1, 1, 2, 1, 64),
    Case(Band.causal(100), 601, None, 2, 4, 2, 64),
    Case(Band(-30, 50), 257, 300, 1, 4, 4, 128),
    Case(Band(3, 90), 400, 257, 1, 4, 4, 96),
    Case(Band(-300, None), 257, 600, 1, 2, 2, 64),
    Case(Band(-20, None), 600, 100, 1, 2, 2, 64),
    Case(CAUSAL, 257, None, 1, 2, 2, 256),
    Case(CAUSAL, 601, None, 2, 4, 2, 64, q_documents=((300, 1, 0, 200), (601,))),
    Case(Band.causal(50), 601, None, 2, 4, 4, 128, q_documents=((128, 128, 345), (5, 500)), sinks=True),
    Case(FULL, 111, None, 2, 2, 2, 64, q_documents=((), (1, 64))),
    Case(FULL, 111, 300, 2, 4, 2, 64, q_documents=((40, 30, 41), (111,)), k_documents=((200, 0, 100), (1, 250))),
)


def name(case: Case) -> str:
    return f"{case.band.lo}to{case.band.hi}-{case.q_length}x{case.k_length}-{case.heads}of{case.kv_heads}-d{case.dim}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", BOTH, ids=name)
@pytest.mark.parametrize("kernel", [CUDNN, FLASH], ids=lambda kernel: kernel.name)
def test_equals_plain_attention(kernel: AttentionKernel, case: Case, dtype: torch.dtype) -> None:
    check_kernel(kernel, case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", FLASH_ONLY, ids=name)
def test_flash_under_any_mask(case: Case, dtype: torch.dtype) -> None:
    check_kernel(FLASH, case, dtype, "cuda")


def test_cudnn_with_values_of_another_dimension() -> None:
    check_kernel(CUDNN, Case(CAUSAL, 256, None, 1, 4, 4, 128, 64), torch.bfloat16, "cuda")


@pytest.mark.parametrize("kernel", [CUDNN, FLASH], ids=lambda kernel: kernel.name)
def test_views_of_one_projection(kernel: AttentionKernel) -> None:
    """q, k, v as slices of one tensor, and dout in another memory order."""
    t = Case(CAUSAL, 384, None, 2, 4, 4, 64).tensors(torch.bfloat16, "cuda")
    fused = torch.cat([t.q, t.k, t.v], 2)
    views = fused.split(4, 2)
    dout = t.dout.transpose(1, 2).contiguous().transpose(1, 2)
    plain = results(LocalAttend(kernel).with_lse, t[:3], t.mask, t.spec, t.dout)
    other = results(LocalAttend(kernel).with_lse, views, t.mask, t.spec, dout)
    for what, value in plain.items():
        torch.testing.assert_close(other[what], value, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("layout", SequenceLayout)
@pytest.mark.parametrize("kernel", [CUDNN, FLASH], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("sinks", [False, True])
def test_in_a_ring(kernel: AttentionKernel, layout: SequenceLayout, sinks: bool) -> None:
    check_in_a_ring(kernel, layout, Case(CAUSAL, 512, None, 1, 4, 2, 64, sinks=sinks))


@pytest.mark.parametrize("layout", [SequenceLayout.ZIGZAG, SequenceLayout.CONTIGUOUS])
@pytest.mark.parametrize("packed", [(512,), (100, 1, 200, 150), (3, 120, 389)])
def test_flash_in_a_ring_with_documents(layout: SequenceLayout, packed: tuple[int, ...]) -> None:
    """As a recipe has it."""
    check_in_a_ring(FLASH, layout, Case(CAUSAL, 512, None, 1, 4, 2, 64, q_documents=(packed,)))


def check_in_a_ring(kernel: AttentionKernel, layout: SequenceLayout, case: Case) -> None:
    """Four ranks as threads of this process: the lse and delta of whole rows reach the operators' backward. Partial results are of
    the inputs' precision here: a ring may lose 2.5 times what one device loses, plus 2e-3."""
    ranks = 4
    t = case.tensors(torch.bfloat16, "cuda")
    exact = case.in_dtype(t, torch.float32)
    truth = results(naive_attention, exact[:3], exact.mask, exact.spec, exact.dout)
    local = results(LocalAttend(ReferenceKernel()).with_lse, t[:3], t.mask, t.spec, t.dout)

    def work(exchange: ThreadExchange) -> dict[str, Tensor]:
        q, k, v, dout = (layout.shard(x.detach(), ranks, exchange.rank) for x in t[:4])
        return results(RingAttend(kernel, exchange, layout).with_lse, (q, k, v), t.mask, t.spec, dout)

    shards = run_ring(ranks, work).results
    for what, dim in {"out": 1, "lse": 2, "dq": 1, "dk": 1, "dv": 1}.items():
        whole = layout.unshard([shard[what] for shard in shards], dim=dim)
        assert_close_to_truth(whole, truth[what], local[what], what, factor=2.5, noise=2e-3)


@pytest.mark.parametrize("kernel", [CUDNN, FLASH], ids=lambda kernel: kernel.name)
def test_refuses_nothing_that_it_does(kernel: AttentionKernel) -> None:
    needs = Needs(frozenset(("full", "causal")), False, frozenset(), 128, 128, torch.bfloat16, "cuda")
    assert kernel.refuses(needs) == []
    assert kernel.refuses(replace(needs, dtype=torch.float32))
