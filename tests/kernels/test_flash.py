"""The Triton kernels in Triton's interpreter, on tiny tiles; tests/kernels/test_flash_gpu.py runs them for real."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from longtrain.attention import AttentionSpec, Band, Block, Grads, Needs, Partial
from longtrain.attention.dropout import keep_mask
from longtrain.attention.merge import empty_partial, zero_grads
from longtrain.attention.reference import ReferenceKernel
from longtrain.errors import KernelError
from longtrain.kernels.flash import FlashKernel
from longtrain.kernels.flash.kernel import Call
from longtrain.kernels.flash.tiles import COMPACT, TABLE, Pass, Tile, Tiles, tile_for, tiles_for
from longtrain.kernels.language import has_triton, interprets
from longtrain.kernels.local import LocalAttend
from tests.attention_cases import Case, cases, check_kernel
from tests.parity import results

pytestmark = [
    pytest.mark.skipif(not has_triton(), reason="Triton is not installed"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:overflow encountered:RuntimeWarning"),
]
interpreted = pytest.mark.skipif(has_triton() and not interprets(), reason="Triton compiles here: test_flash_gpu.py runs instead")


def tiles(rows: int, columns: int) -> Tiles:
    return {(kernel, 256, size): Tile(rows, columns) for kernel in Pass for size in (2, 4)}


SMALL, FLAT = FlashKernel(interpret=True, tiles=tiles(16, 32)), FlashKernel(interpret=True, tiles=tiles(64, 16), descriptors=False)
PACKED = ((30, 1, 0, 20), (40, 17))
FEATURES = {
    "causal": Case(),
    "full": Case(Band.full()),
    "window": Case(Band.causal(9)),
    "striped ring": Case(Band(1, None)),
    "upper": Case(Band(None, 3)),
    "two-sided": Case(Band(-5, 4)),
    "bottom right": Case(Band(-17, None), k_length=80),
    "cross": Case(Band.full(), k_length=20),
    "documents": Case(q_documents=PACKED),
    "documents across": Case(Band.full(), k_length=50, q_documents=PACKED, k_documents=((9, 30), (40,))),
    "grouped heads": Case(heads=4),
    "one key head": Case(heads=3, kv_heads=1),
    "odd widths": Case(dim=20, value_dim=5),
    "softcap": Case(softcap=1.5),
    "alibi": Case(alibi=True),
    "bias, whole": Case(bias="whole"),
    "bias, matrix": Case(bias="matrix"),
    "bias, rows": Case(bias="rows"),
    "bias, vector": Case(bias="vector"),
    "bias, scalar": Case(bias="scalar"),
    "dropout": Case(dropout=0.3),
    "negative scale": Case(scale=-0.3),
}
EVERYTHING = Case(Band.causal(40), 63, None, 2, 4, 2, 8, 5, PACKED, None, 0.4, 2.0, True, "whole", 0.2)


@interpreted
@pytest.mark.parametrize("name", FEATURES)
def test_each_feature(name: str) -> None:
    check_kernel(SMALL, replace(FEATURES[name], q_length=63), torch.float32)


@interpreted
@pytest.mark.parametrize("name", ["causal", "full", "window", "striped ring", "upper", "grouped heads", "bias, vector"])
def test_through_descriptors(name: str) -> None:
    """Half precision of these widths is read through descriptors, fp32 is not."""
    check_kernel(SMALL, replace(FEATURES[name], q_length=63), torch.float16)


@interpreted
@pytest.mark.parametrize("kernel", [SMALL, FLAT], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("length", [1, 111])
def test_lengths_in_half_precision(kernel: FlashKernel, length: int) -> None:
    check_kernel(
        kernel, Case(Band.causal(50), length, heads=4, q_documents=((0, 1), (1,)) if length == 1 else PACKED), torch.float16
    )


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_features_at_once(dtype: torch.dtype) -> None:
    check_kernel(FLAT, EVERYTHING, dtype)


@interpreted
@settings(max_examples=6)
@given(cases())
def test_any_features_at_once(case: Case) -> None:
    check_kernel(SMALL, case, torch.float32)


@interpreted
def test_parts_merge_into_accumulators() -> None:
    """Two blocks of keys, with global origins, are the whole."""
    case = replace(EVERYTHING, q_length=40, q_documents=((20, 1, 0, 19), (33, 5)))
    q, k, v, dout, _, mask, spec = case.tensors(torch.float32)
    whole, truth = Block.of(mask), ReferenceKernel()
    out, lse = truth.forward(q, k, v, whole, spec)
    delta = torch.randn(lse.shape)
    expected = truth.backward(dout, q, k, v, lse, delta, whole, spec)
    partial, grads = empty_partial(q, v.shape[-1]), zero_grads(q, k, v, spec.bias)
    assert grads.dbias is not None
    for k0, nk in ((0, 24), (24, 16)):
        block, narrow = whole.narrow(0, 40, k0, nk), spec.narrow(0, 40, k0, nk)
        part = (q, k.narrow(1, k0, nk), v.narrow(1, k0, nk))
        assert SMALL.forward(*part, block, narrow, into=partial) is partial
        into = Grads(grads.dq, grads.dk.narrow(1, k0, nk), grads.dv.narrow(1, k0, nk), grads.dbias.narrow(3, k0, nk))
        assert SMALL.backward(dout, *part, lse, delta, block, narrow, into=into) is into
    torch.testing.assert_close(partial, Partial(out, lse), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(tuple(grads), tuple(expected), atol=5e-6, rtol=1e-5)


@interpreted
@pytest.mark.parametrize("shape", ["rows", "columns", "heads"])
def test_gradients_of_broadcast_biases_are_added(shape: str) -> None:
    q, k, v, dout, _, mask, spec = Case(Band.causal(), 20, bias=shape).tensors(torch.float32)
    block, truth = Block.of(mask), ReferenceKernel()
    out, lse = truth.forward(q, k, v, block, spec)
    delta = (out * dout).sum(-1).transpose(1, 2)
    once, twice = truth.backward(dout, q, k, v, lse, delta, block, spec), zero_grads(q, k, v, spec.bias)
    for _ in range(2):
        SMALL.backward(dout, q, k, v, lse, delta, block, spec, into=twice)
    assert once.dbias is not None
    assert twice.dbias is not None
    torch.testing.assert_close(twice.dbias, 2 * once.dbias.detach(), atol=1e-5, rtol=1e-5)


@interpreted
@pytest.mark.parametrize(("q_start", "k_start", "stride"), [(0, 0, 1), (2**31 + 5, 7, 3)])
def test_dropout_is_the_generator_of_attention(q_start: int, k_start: int, stride: int) -> None:
    """Uniform probabilities times the identity show every decision."""
    size, heads = 40, 2
    q, v = torch.zeros(2, size, heads, 8), torch.eye(size)[None, :, None, :].expand(2, size, heads, size)
    seed = torch.tensor([-(2**62) - 3, 2**40 + 17])
    block = Block(Band.full(), q_start=q_start, k_start=k_start, stride=stride)
    out, _ = SMALL.forward(q, q, v, block, AttentionSpec(dropout=0.3, dropout_seed=seed))
    keep = keep_mask(seed, heads, block.q_positions(size, q.device), block.k_positions(size, q.device), 0.3)
    assert torch.equal(out.transpose(1, 2) != 0, keep)


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN:RuntimeWarning")
def test_tiles_outside_the_band_and_the_document_are_not_read() -> None:
    """What is NaN there stays there: skipped, not masked."""
    q, k, v = (torch.randn(1, 96, 2, 8) for _ in range(3))
    k[:, :32] = v[:, :32] = float("nan")
    segments = torch.arange(96, dtype=torch.int32)[None] // 32
    for block in (Block(Band.causal(), segments, segments), Block(Band(0, 20))):
        rows = slice(64, 96)
        out, lse = SMALL.forward(q, k, v, block, AttentionSpec())
        assert out[:, rows].isfinite().all()
        finite = lse.nan_to_num(0)
        grads = SMALL.backward(torch.ones_like(q), q, k, v, finite, torch.zeros_like(lse), block, AttentionSpec())
        assert grads.dq[:, rows].isfinite().all()
        assert grads.dk[:, rows].isfinite().all()


@interpreted
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_what_is_no_number_is_not_taken_for_an_empty_row(softcap: float | None, merged: bool) -> None:
    q, k, v, _, _, mask, spec = Case(q_length=40, q_documents=((30,), (40,)), softcap=softcap).tensors(torch.float32)
    k[0, 20] = float("nan")
    found, truth = (
        kernel.forward(q, k, v, Block.of(mask), spec, into=empty_partial(q, v.shape[-1]) if merged else None)
        for kernel in (SMALL, ReferenceKernel())
    )
    assert found.lse[0, :, 20:30].isnan().all()
    assert found.lse[0, :, 30:].eq(-torch.inf).all()
    torch.testing.assert_close(found, truth, atol=1e-5, rtol=1e-5, equal_nan=True)


@interpreted
def test_a_bias_that_hides_keys() -> None:
    """As a mask of booleans becomes one; a row sees nothing."""
    t = Case(Band.full(), 40).tensors(torch.float32)
    mask = torch.rand(40, 40) > 0.5
    mask[7] = False
    spec = AttentionSpec(bias=torch.zeros(40, 40).masked_fill(~mask, -torch.inf).requires_grad_())
    found, truth = (
        results(LocalAttend(kernel).with_lse, t[:3], t.mask, spec, t.dout, t.dlse) for kernel in (SMALL, ReferenceKernel())
    )
    torch.testing.assert_close(found, truth, atol=1e-5, rtol=1e-5)


@interpreted
def test_any_strides_with_a_contiguous_last_dimension() -> None:
    """Fused q, k, v, heads before positions, transposed segments, a bias of any layout, a last dimension with steps."""
    qkv = torch.randn(2, 33, 3, 2, 8)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1].transpose(1, 2).contiguous().transpose(1, 2), torch.randn(2, 33, 2, 16)[..., ::2]
    segments = torch.arange(33, dtype=torch.int32)[:, None].expand(33, 2).div(20, rounding_mode="floor").t()
    spec = AttentionSpec(bias=torch.randn(33, 33).t())
    block, truth = Block(Band.causal(), segments, segments), ReferenceKernel()
    out, lse = truth.forward(q, k, v, block, spec)
    torch.testing.assert_close(SMALL.forward(q, k, v, block, spec), Partial(out, lse), atol=2e-6, rtol=1e-5)
    dout, delta = torch.randn(2, 2, 33, 8).transpose(1, 2), torch.randn(2, 33, 2).transpose(1, 2)
    given = (dout, q, k, v, lse.transpose(1, 2).contiguous().transpose(1, 2), delta, block, spec)
    torch.testing.assert_close(tuple(SMALL.backward(*given)), tuple(truth.backward(*given)), atol=5e-6, rtol=1e-5)


@interpreted
def test_segments_in_any_order() -> None:
    """Shards of a ring, or whatever a user numbers: not sorted, with padding in between."""
    q = torch.randn(1, 80, 1, 8)
    segments = torch.randint(-1, 3, (1, 80), dtype=torch.int32)
    segments[:, 16:48] = 1
    block, truth = Block(Band.full(), segments, segments), ReferenceKernel()
    torch.testing.assert_close(
        SMALL.forward(q, q, q, block, AttentionSpec()), truth.forward(q, q, q, block, AttentionSpec()), atol=2e-6, rtol=1e-5
    )


NEEDS = Needs(frozenset(("full",)), False, frozenset(), 64, 64, torch.bfloat16, "cuda")


def test_refusals() -> None:
    assert FlashKernel().refuses(NEEDS) == []
    everything = replace(
        NEEDS, kinds=frozenset(("band",)), documents=True, features=frozenset(("softcap", "alibi", "bias", "dropout"))
    )
    assert FlashKernel().refuses(replace(everything, head_dim=256, value_dim=59)) == []
    assert FlashKernel().refuses(replace(NEEDS, device="cpu")) == ["runs on CUDA GPUs, not on cpu"]
    assert FlashKernel(interpret=True).refuses(replace(NEEDS, device="cpu", dtype=torch.float32)) == []
    assert FlashKernel(interpret=True).refuses(replace(NEEDS, device="cpu")) == [
        "Triton's interpreter multiplies bf16 matrices wrongly"
    ]
    assert FlashKernel().refuses(replace(NEEDS, dtype=torch.float64)) == ["computes in fp16, bf16 and fp32, not in float64"]
    assert FlashKernel().refuses(replace(NEEDS, head_dim=257, value_dim=512)) == [
        "has head dimensions up to 256, not 257",
        "has value head dimensions up to 256, not 512",
    ]


def test_every_width_has_a_tile() -> None:
    for kernel in Pass:
        for size in (2, 4):
            for width in (16, 32, 64, 128, 256):
                assert tile_for(kernel, width, size) in TABLE.values()
                assert tile_for(kernel, width, size, COMPACT) in COMPACT.values()


def test_tables_by_shared_memory() -> None:
    """Those of compute capabilities 9.0 and 10, of 8.0, of 8.6, 8.9 and 12.0, and of who tells nothing."""
    assert tiles_for(232448) is TABLE
    for less in (166912, 101376, 0):
        assert tiles_for(less) is COMPACT


@pytest.mark.parametrize("tiles", [TABLE, COMPACT])
def test_longest_sequence_of_a_grid(tiles: Tiles) -> None:
    """What `grid` refuses while it runs is refused before."""
    kernel, most = FlashKernel(tiles=tiles), 65535 * 16
    wide = replace(NEEDS, dtype=torch.float32, head_dim=256, value_dim=256)
    assert kernel.refuses(replace(wide, length=most)) == []
    assert kernel.refuses(replace(wide, length=2**20)) == [
        "has up to 1,048,560 tokens on a rank at this width and precision, not 1,048,576"
    ]
    assert kernel.refuses(replace(NEEDS, length=2**20)) == []
    q, v = (torch.empty(1, 2**20, 1, 200 + i, device="meta") for i in range(2))
    call = Call(kernel, q, q, v, Block(Band.causal()), AttentionSpec())
    with pytest.raises(KernelError, match="1,048,576 tokens in one block; up to 1,048,560 are possible"):
        call.grid(2**20, call.tile(Pass.QUERIES).rows, q, v)


compiles = pytest.mark.skipif(shutil.which("ptxas") is None and not has_triton(), reason="no ptxas to compile with")


def compiled_offline(*arguments: str | int) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.kernels.offline", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"}, timeout=250)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@compiles
@pytest.mark.parametrize("dim", [64, 128])
def test_compiles_for_hopper_without_spilling(dim: int) -> None:
    """With wgmma and tensor descriptors; next to nothing spilled between products."""
    kernels = {kernel["kernel"]: kernel for kernel in compiled_offline(1, 4096, 16, 16, dim, "bfloat16")}
    for name in ("forward_kernel", "queries_kernel", "keys_kernel"):
        kernel = kernels[name]
        assert kernel["spilled_in_loop"] <= 4, kernel
        assert kernel["HGMMA"] > 0, kernel
        assert kernel["UTMALDG"] > 0, kernel
        assert "HMMA" not in kernel, kernel


FEW = {(64, "segments", 90), (128, "runs", 90), (128, "segments", 86), (256, "runs", 120)}
"""Between them every width, both kinds of documents, both tables, with and without a tensor memory accelerator."""


@compiles
@pytest.mark.parametrize(
    ("dim", "documents", "capability"),
    [
        pytest.param(*x, marks=[] if x in FEW else pytest.mark.faults)
        for x in product((64, 128, 256), ("runs", "segments"), (80, 86, 90, 120))
    ],
)
def test_everything_at_once_compiles_and_fits(dim: int, documents: str, capability: int) -> None:
    """What the interpreter lets pass the compiler may not; and no program may want more shared memory than there is."""
    kernels = compiled_offline(2, 512, 4, 2, dim, "bfloat16", "--everything", documents, "--on", capability)
    finds = {"runs": "runs_kernel", "segments": "ranges_kernel"}[documents]
    assert {kernel["kernel"] for kernel in kernels} >= {"forward_kernel", "queries_kernel", "keys_kernel", "bias_kernel", finds}
    for kernel in kernels:
        assert kernel["shared"] <= kernel["most_shared"], kernel
