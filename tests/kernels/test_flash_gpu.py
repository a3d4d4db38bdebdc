"""The Triton kernels on a GPU: a wide sweep, every tile of the table, poisoned memory, offsets beyond 32 bits, equal bits.

Compiling is most of the time. The sweep is cut into SHARDS tests, so that as many processes can share it: `-k "shard3-"`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longtrain.attention import AttentionMask, AttentionSpec, Band, Block
from longtrain.attention.merge import row_dot
from longtrain.attention.reference import ReferenceKernel
from longtrain.kernels.flash import FlashKernel
from longtrain.kernels.flash.tiles import COMPACT, TABLE, Pass, Tiles, tile_for
from longtrain.kernels.local import LocalAttend
from tests.attention_cases import Case, check_kernel
from tests.attention_sweep import DTYPES, SHARDS, problems
from tests.parity import results

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
KERNEL = FlashKernel()


@pytest.fixture(autouse=True)
def _free() -> None:
    torch.cuda.empty_cache()
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.timeout(580)
@pytest.mark.parametrize("shard", range(SHARDS), ids=[f"shard{i}-" for i in range(SHARDS)])
def test_sweep(shard: int) -> None:
    failures = []
    cases = problems(shard)
    for case, dtype in cases:
        try:
            check_kernel(KERNEL, case, dtype, "cuda")
        except Exception as error:
            failures.append(f"{case} {dtype}: {type(error).__name__}: {str(error)[:300]}")
    assert not failures, f"{len(failures)} of {len(cases)}:\n" + "\n".join(failures[:8])


@pytest.mark.parametrize("tiles", [TABLE, COMPACT], ids=["table", "compact"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", sorted({width for _, width, _ in TABLE}))
def test_every_tile(width: int, dtype: torch.dtype, tiles: Tiles) -> None:
    """Through descriptors and through pointers, over several tiles and a rest, with documents and without."""
    assert all(tile_for(kernel, width, dtype.itemsize, tiles) in tiles.values() for kernel in Pass)
    for descriptors in (True, False) if dtype != torch.float32 else (False,):
        kernel = FlashKernel(tiles=tiles, descriptors=descriptors)
        for case in (
            Case(Band.causal(), 601, None, 1, 4, 2, width),
            Case(Band.full(), 385, 300, 1, 2, 2, width, bias="whole"),
            Case(Band.causal(200), 601, None, 1, 2, 2, width, q_documents=((1, 300, 0, 250),)),
        ):
            check_kernel(kernel, case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 63, 111, 4097])
def test_odd_lengths(length: int, dtype: torch.dtype) -> None:
    packed = ((length // 2, 0, 1, length // 3),)
    for case in (
        Case(Band.causal(), length, None, 1, 2, 1, 64),
        Case(Band.full(), length, None, 1, 2, 1, 64),
        Case(Band.causal(100), length, None, 1, 2, 1, 64, q_documents=packed if length > 1 else ((1,),)),
        Case(Band(-3, None), length, 63, 1, 2, 2, 64),
    ):
        check_kernel(KERNEL, case, dtype, "cuda")


def test_tf32_by_choice() -> None:
    """Looser than IEEE products and never taken unasked."""
    case = Case(Band.causal(), 300, None, 1, 2, 2, 64)
    q, k, v, *_ = case.tensors(torch.float32, "cuda")
    block, spec = Block(Band.causal()), AttentionSpec()
    exact, _ = ReferenceKernel().forward(q.double(), k.double(), v.double(), block, spec)
    errors = [(FlashKernel(precision=p).forward(q, k, v, block, spec).out - exact).abs().max().item() for p in ("ieee", "tf32")]
    assert errors[0] < 5e-6 < errors[1] < 5e-3


def test_the_table_of_this_gpu() -> None:
    wide = torch.cuda.get_device_capability() in ((9, 0), (10, 0), (10, 3))
    assert KERNEL.table(torch.device("cuda")) is (TABLE if wide else COMPACT)


def inside(x: Tensor, margins: tuple[int, ...], fill: float = float("nan")) -> Tensor:
    """The values of x, as a view into memory that holds `fill` on every side."""
    view = torch.full([size + 2 * more for size, more in zip(x.shape, margins, strict=True)], fill, dtype=x.dtype, device=x.device)
    for dimension, more in enumerate(margins):
        view = view.narrow(dimension, more, x.shape[dimension])
    return view.copy_(x)


@pytest.mark.parametrize(
    ("width", "descriptors", "documents"),
    [(64, True, ""), (64, False, ""), (80, True, ""), (80, False, ""), (64, True, "runs"), (80, False, "segments")],
)
def test_memory_around_the_inputs_is_never_used(width: int, descriptors: bool, documents: str) -> None:
    """Inputs are views into NaN on every side: before, behind, between heads and beyond the width. Around segments is a document
    that there is, around seeds another seed. With documents come a bias, slopes and dropout."""
    length, heads, kernel = 333, 2, FlashKernel(descriptors=descriptors)
    q, k, v, dout = (torch.randn(2, length, heads, width, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    block, spec = Block(Band.causal(150)), AttentionSpec()
    if documents:
        ids = torch.tensor([[0] * 150 + [1] * 150 + [-1] * 33] * 2, dtype=torch.int32, device="cuda")
        slopes, seed = torch.tensor([0.5, 0.25], device="cuda"), torch.tensor([5, 7], device="cuda")
        bias = torch.randn(2, heads, length, length, device="cuda", dtype=torch.bfloat16)
        block = replace(block, q_segments=ids, k_segments=ids, runs=documents == "runs")
        spec = AttentionSpec(alibi_slopes=slopes, bias=bias, dropout=0.1, dropout_seed=seed)
    out, lse = kernel.forward(q, k, v, block, spec)
    delta = row_dot(dout, out)
    expected = kernel.backward(dout, q, k, v, lse, delta, block, spec)
    q, k, v, dout = (inside(x, (1, 128, 1, 8)) for x in (q, k, v, dout))
    lse_, delta_ = (inside(x, (1, 1, 128)) for x in (lse, delta))
    if documents:
        block = replace(block, q_segments=inside(ids, (1, 128), 1), k_segments=inside(ids, (1, 128), 1))
        spec = replace(
            spec, alibi_slopes=inside(slopes, (8,)), bias=inside(bias, (1, 1, 128, 128)), dropout_seed=inside(seed, (8,), 9)
        )
    got = kernel.forward(q, k, v, block, spec)
    assert torch.equal(got.out, out)
    assert torch.equal(got.lse, lse)
    for a, b in zip(kernel.backward(dout, q, k, v, lse_, delta_, block, spec), expected, strict=True):
        if a is not None and b is not None:
            assert a.isfinite().all()
            assert torch.equal(a, b)


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_what_is_no_number_is_not_taken_for_an_empty_row(softcap: float | None) -> None:
    """The hardware's maximum drops what is no number: a row that meets one must not get the lse of a row that sees nothing."""
    case = Case(Band.causal(), 400, None, 1, 4, 2, 64, q_documents=((300,),), k_documents=((400,),), softcap=softcap)
    q, k, v, _, _, mask, spec = case.tensors(torch.bfloat16, "cuda")
    k[0, 200] = float("nan")
    out, lse = KERNEL.forward(q, k, v, Block.of(mask), spec)
    assert out[0, :200].isfinite().all()
    assert lse[0, :, :200].isfinite().all()
    assert lse[0, :, 200:300].isnan().all()
    assert lse[0, :, 300:].eq(-torch.inf).all()


def test_offsets_beyond_32_bits() -> None:
    """131,328 tokens of 64 heads of 256: 2^31 + 2^22 elements a tensor. A window makes the end depend on the end alone."""
    length, window, tail = 2**17 + 256, 100, 512
    q, k, v, dout = (torch.randn(1, length, 64, 256, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    assert q.numel() > 2**31
    mask = AttentionMask(Band.causal(window))
    out, lse = KERNEL.forward(q, k, v, Block.of(mask), AttentionSpec())
    delta = torch.randn_like(lse)
    grads = KERNEL.backward(dout, q, k, v, lse, delta, Block.of(mask), AttentionSpec())
    ends = [x[:, -tail:].contiguous() for x in (dout, q, k, v)]
    small, small_lse = KERNEL.forward(*ends[1:], Block.of(mask), AttentionSpec())
    torch.testing.assert_close(out[:, -256:], small[:, -256:], atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(lse[..., -256:], small_lse[..., -256:], atol=1e-4, rtol=1e-4)
    rows = [x[..., -tail:].contiguous() for x in (lse, delta)]
    for whole, part in zip(grads[:3], KERNEL.backward(*ends, *rows, Block.of(mask), AttentionSpec())[:3], strict=True):
        torch.testing.assert_close(whole[:, -256:], part[:, -256:], atol=2e-2, rtol=2e-2)


def test_two_runs_are_equal_bit_for_bit() -> None:
    case = Case(Band.causal(), 1500, None, 2, 8, 2, 128, q_documents=((700, 1, 300, 400), (1500,)), bias="heads", dropout=0.1)
    given = case.tensors(torch.bfloat16, "cuda")
    runs = [results(LocalAttend(KERNEL).with_lse, given[:3], given.mask, given.spec, given.dout, given.dlse) for _ in range(2)]
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


def test_no_buffer_grows_with_the_square() -> None:
    """Forward and backward of 64K tokens hold the results and less than twice q beside them."""
    q, k, v, dout = (torch.randn(1, 2**16, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    segments = (torch.arange(2**16, device="cuda", dtype=torch.int32) // 3000)[None]
    block, spec = Block(Band.causal(), segments, segments), AttentionSpec()
    out, lse = KERNEL.forward(q, k, v, block, spec)
    delta = row_dot(dout, out)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    KERNEL.backward(dout, q, k, v, lse, delta, block, spec)
    assert torch.cuda.max_memory_allocated() - before < 3 * q.nbytes + 2 * q.nbytes


def test_everything_at_once_over_many_tiles() -> None:
    case = Case(Band.causal(700), 1111, None, 2, 4, 2, 96, 80, ((600, 1, 0, 300), (1111,)), None, 0.1, 20.0, True, "whole", 0.1)
    for dtype in (torch.bfloat16, torch.float16):
        check_kernel(KERNEL, replace(case, seed=5), dtype, "cuda")
