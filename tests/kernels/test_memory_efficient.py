from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longtrain.attention import AttentionMask, AttentionSpec, Band, Block, Partial
from longtrain.attention.merge import empty_partial, row_dot, zero_grads
from longtrain.attention.reference import ReferenceKernel
from longtrain.kernels.local import LocalAttend
from longtrain.kernels.memory_efficient import MemoryEfficientKernel
from tests.attention_cases import BIAS_SHAPES, Case, cases, check_kernel
from tests.parity import results

TILES = [(16, 16), (7, 32), (64, 5), (512, 512)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PACKED = ((30, 1, 0, 40), (63, 48))
EVERYTHING = Case(Band.causal(40), 111, None, 2, 6, 2, 8, 5, PACKED, None, 0.4, 2.0, True, "whole", 0.2)


@settings(max_examples=150)
@given(cases(), st.integers(1, 20), st.integers(1, 20))
def test_equals_the_truth(case: Case, q_tile: int, k_tile: int) -> None:
    check_kernel(MemoryEfficientKernel(q_tile, k_tile), case, torch.float64)


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("length", [1, 63, 111])
@pytest.mark.parametrize("dtype", DTYPES)
def test_precisions(length: int, dtype: torch.dtype, tiles: tuple[int, int]) -> None:
    plain = Case(Band.causal(), length, None, 2, 4, 2, 16, seed=length)
    for case in (plain, replace(plain, softcap=2.0, alibi=True, bias="heads"), replace(plain, band=Band.full(), dropout=0.2)):
        check_kernel(MemoryEfficientKernel(*tiles), case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_feature_at_once(dtype: torch.dtype) -> None:
    for shape in (None, *BIAS_SHAPES):
        check_kernel(MemoryEfficientKernel(32, 16), replace(EVERYTHING, bias=shape), dtype)


@pytest.mark.parametrize(("queries", "keys"), [(0, 4), (4, 0), (0, 0)])
def test_no_queries_or_no_keys(queries: int, keys: int) -> None:
    t = Case(Band.full(), queries, keys, q_documents=((queries,), ()), k_documents=((keys,), ())).tensors(torch.float32)
    got = results(LocalAttend(MemoryEfficientKernel()).with_lse, t[:3], t.mask, t.spec, t.dout, t.dlse)
    assert got["out"].shape == t.dout.shape
    assert (got["lse"] == -torch.inf).all()


def poisoned(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same numbers as a strided view inside a buffer of NaN; `order` permutes how dimensions lie in memory."""
    shape = [2 * x.shape[d] + 3 for d in order]
    buffer = torch.full(shape, torch.nan, dtype=x.dtype) if x.is_floating_point() else torch.full(shape, 12345, dtype=x.dtype)
    inner = buffer[tuple(slice(1, 1 + 2 * x.shape[d], 2) for d in order)]
    view = inner.permute([order.index(d) for d in range(x.ndim)])
    view.copy_(x)
    assert not view.is_contiguous()
    return view


@pytest.mark.parametrize("kernel", [ReferenceKernel(), MemoryEfficientKernel(32, 16)], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1)])
def test_strides_and_surroundings_do_not_matter(kernel: ReferenceKernel | MemoryEfficientKernel, order: tuple[int, ...]) -> None:
    t = replace(EVERYTHING, bias=None).tensors(torch.float32)
    ids = t.mask.q_segments
    assert ids is not None
    block = Block(t.mask.band, ids, ids)
    out, lse = kernel.forward(t.q, t.k, t.v, block, t.spec)
    delta = row_dot(t.dout, out)
    grads = kernel.backward(t.dout, t.q, t.k, t.v, lse, delta, block, t.spec)
    q, k, v, dout = (poisoned(x, order) for x in (t.q, t.k, t.v, t.dout))
    strided = replace(block, q_segments=poisoned(ids, (1, 0)), k_segments=poisoned(ids, (0, 1)))
    got = kernel.forward(q, k, v, strided, t.spec)
    torch.testing.assert_close(got, Partial(out, lse), rtol=1e-5, atol=1e-5)
    strided_grads = kernel.backward(dout, q, k, v, poisoned(lse, (2, 0, 1)), poisoned(delta, (1, 2, 0)), strided, t.spec)
    torch.testing.assert_close(strided_grads[:3], grads[:3], rtol=1e-5, atol=1e-5)


@settings(max_examples=40)
@given(cases(lengths=st.integers(2, 40)), st.integers(1, 39))
def test_into_continues_a_partial_result(case: Case, cut: int) -> None:
    """Keys in two calls that add to one partial result and to one set of gradients, against all keys at once."""
    kernel = MemoryEfficientKernel(8, 8)
    t = case.tensors(torch.float64)
    whole, keys = Block.of(t.mask), t.k.shape[1]
    cut = min(cut, keys - 1)
    expected = kernel.forward(t.q, t.k, t.v, whole, t.spec)
    merged, grads = empty_partial(t.q, t.v.shape[-1]), zero_grads(t.q, t.k, t.v)
    parts = [(slice(0, cut), 0, cut), (slice(cut, keys), cut, keys - cut)]
    for columns, k0, nk in parts:
        block, spec = whole.narrow(0, case.q_length, k0, nk), t.spec.narrow(0, case.q_length, k0, nk)
        assert kernel.forward(t.q, t.k[:, columns], t.v[:, columns], block, spec, into=merged) is merged
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-12)
    delta = row_dot(t.dout, expected.out)
    for columns, k0, nk in parts:
        block, spec = whole.narrow(0, case.q_length, k0, nk), t.spec.narrow(0, case.q_length, k0, nk)
        part = grads._replace(dk=grads.dk[:, columns], dv=grads.dv[:, columns])
        kernel.backward(t.dout, t.q, t.k[:, columns], t.v[:, columns], expected.lse, delta, block, spec, into=part)
    plain = kernel.backward(t.dout, t.q, t.k, t.v, expected.lse, delta, whole, t.spec)
    torch.testing.assert_close(grads[:3], plain[:3], rtol=0, atol=1e-12)


class LiveBytes(TorchDispatchMode):
    """The most bytes of storages, made inside, that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._seen and storage.nbytes():
            self._seen[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._seen.pop(key)


def peak(length: int, attend: LocalAttend, mask: AttentionMask) -> int:
    """Bytes above the inputs of one forward and backward."""
    q, k, v = (torch.randn(1, length, 1, 8, requires_grad=True) for _ in range(3))
    with LiveBytes() as live:
        attend(q, k, v, mask, AttentionSpec(softcap=3.0)).sum().backward()
    return live.peak


def test_live_bytes_sees_a_matrix() -> None:
    """The control: the dense kernel does hold matrices."""
    mask = AttentionMask(Band.causal())
    small, large = (peak(length, LocalAttend(ReferenceKernel()), mask) for length in (512, 1024))
    assert small > 512**2 * 4
    assert 3.5 < large / small < 4.5


@pytest.mark.parametrize("documents", [False, True])
def test_memory_is_linear_in_the_length(documents: bool) -> None:
    attend, peaks = LocalAttend(MemoryEfficientKernel(128, 128)), []
    for length in (1024, 2048, 4096):
        ids = (torch.arange(length, dtype=torch.int32) // 700)[None] if documents else None
        peaks.append(peak(length, attend, AttentionMask(Band.causal(), ids, ids)))
    growth = [b - a for a, b in pairwise(peaks)]
    assert growth[1] == pytest.approx(2 * growth[0], rel=0.05)
    assert growth[0] < 1024 * 8 * 4 * 16, "a dozen vectors of 8 floats a token"
    assert peaks[-1] < 4096**2 * 4 / 20


def test_tiles_that_nothing_sees_are_skipped() -> None:
    kernel = MemoryEfficientKernel(16, 16)

    def tiles(mask: AttentionMask) -> int:
        return len(list(kernel._tiles(64, 64, Block.of(mask))))

    ids = (torch.arange(64, dtype=torch.int32) // 16)[None]
    padding = torch.full((1, 64), -1, dtype=torch.int32)
    assert tiles(AttentionMask(Band.full())) == 16
    assert tiles(AttentionMask(Band.causal())) == 10
    assert tiles(AttentionMask(Band.causal(17))) == 7
    assert tiles(AttentionMask(Band.full(), ids, ids)) == 4
    assert tiles(AttentionMask(Band.full(), padding, padding)) == 0
    assert tiles(AttentionMask(Band(100, None))) == 0
