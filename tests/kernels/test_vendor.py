"""The adapters to cuDNN and FlashAttention-2, over operators of the same signatures and conventions in plain torch.

Every call is also made on meta tensors, so that it is one that torch's own operators accept.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longtrain.attention import AttentionKernel, AttentionMask, AttentionSpec, Band, Block, Needs, SequenceLayout
from longtrain.attention.merge import empty_partial, zero_grads
from longtrain.attention.reference import ReferenceKernel
from longtrain.errors import KernelError
from longtrain.kernels.local import LocalAttend
from longtrain.kernels.vendor import CudnnKernel, FlashAttention2Kernel, seen
from longtrain.parallel.ring import RingAttend
from tests.attention_cases import Case, bands, boundaries, check_kernel, documents, segments
from tests.parity import assert_close_to_truth, naive_attention, results
from tests.ring_threads import ThreadExchange, run_ring


class Aten:
    """torch.ops.aten on CPUs and in any precision, with the real operators' habits: delta made from out, windows aligned to the end
    in FlashAttention, and a window of all keys taken for none."""

    def __init__(self, dimensions: int = 4) -> None:
        self.dimensions, self.calls = dimensions, list[str]()

    def _accept(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """What the real operator makes of these arguments, as meta tensors of a precision that it knows."""

        def meta(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            dtype = torch.bfloat16 if x.is_floating_point() and x.ndim > 2 else x.dtype
            return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="meta")

        self.calls.append(name)
        return getattr(torch.ops.aten, name)(*map(meta, args), **kwargs)

    def _scaled_dot_product_cudnn_attention(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> Any:
        self._accept("_scaled_dot_product_cudnn_attention", q, k, v, *rest, **more)
        _, _, dropout, causal, _ = rest
        assert dropout == 0
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = _forward(q, k, v, band=Band.causal() if causal else Band.full(), **more)
        return out.transpose(1, 2), lse[..., None] if self.dimensions == 4 else lse, None, None, 0, 0, None, None, None

    def _scaled_dot_product_cudnn_attention_backward(self, *args: Any, scale: float) -> Any:
        self._accept("_scaled_dot_product_cudnn_attention_backward", *args, scale=scale)
        dout, q, k, v, out, lse, *_, dropout, causal = args
        assert dropout == 0
        assert lse.ndim == self.dimensions
        given = tuple(x.transpose(1, 2) for x in (dout, q, k, v, out))
        band = Band.causal() if causal else Band.full()
        return tuple(x.transpose(1, 2) for x in _backward(given, lse.view(q.shape[:3]), band, scale))

    def _flash_attention_forward(self, *args: Any, scale: float, **windows: int) -> Any:
        self._accept("_flash_attention_forward", *args, scale=scale, **windows)
        q, k, v, of_q, of_k, *longest, dropout, causal, _ = args
        assert (dropout, causal) == (0, False)
        if of_q is None:
            return *_forward(q, k, v, band=_band(q.shape[1], k.shape[1], **windows), scale=scale), None, None, None
        parts = [
            _forward(q[None, rows], k[None, keys], v[None, keys], band=_band(*_lengths(rows, keys), **windows), scale=scale)
            for rows, keys in _runs(of_q, of_k, longest)
        ]
        return torch.cat([p[0][0] for p in parts]), torch.cat([p[1][0] for p in parts], 1), None, None, None

    def _flash_attention_backward(self, *args: Any, scale: float, **windows: int) -> Any:
        self._accept("_flash_attention_backward", *args, scale=scale, **windows)
        dout, q, k, v, out, lse, of_q, of_k, *longest, _, _, _, _ = args
        assert lse.is_contiguous()
        if of_q is None:
            return _backward((dout, q, k, v, out), lse, _band(q.shape[1], k.shape[1], **windows), scale)
        parts = [
            _backward(
                (dout[None, rows], q[None, rows], k[None, keys], v[None, keys], out[None, rows]),
                lse[None, :, rows],
                _band(*_lengths(rows, keys), **windows),
                scale,
            )
            for rows, keys in _runs(of_q, of_k, longest)
        ]
        return tuple(torch.cat([x[0] for x in xs]) for xs in zip(*parts, strict=True))


def _runs(of_q: Tensor, of_k: Tensor, longest: list[int]) -> list[tuple[slice, slice]]:
    """Rows and keys of every document."""
    runs = []
    for ends, most in zip((of_q, of_k), longest, strict=True):
        assert ends.dtype == torch.int32
        runs.append([slice(a, b) for a, b in pairwise(ends.tolist())])
        assert all(0 < one.stop - one.start <= most for one in runs[-1])
    return list(zip(*runs, strict=True))


def _lengths(rows: slice, keys: slice) -> tuple[int, int]:
    return rows.stop - rows.start, keys.stop - keys.start


def _band(queries: int, keys: int, window_size_left: int, window_size_right: int) -> Band:
    left = None if window_size_left >= keys or window_size_left < 0 else window_size_left
    right = None if window_size_right >= keys or window_size_right < 0 else window_size_right
    more = queries - keys
    return Band(None if right is None else more - right, None if left is None else left + more)


def _forward(q: Tensor, k: Tensor, v: Tensor, *, band: Band, scale: float | None = None) -> Any:
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    return ReferenceKernel().forward(q, k, v, Block(band), AttentionSpec(scale))


def _backward(given: tuple[Tensor, ...], lse: Tensor, band: Band, scale: float) -> Any:
    dout, q, k, v, out = given
    delta = (dout * out).sum(-1).transpose(1, 2)
    return ReferenceKernel().backward(dout, q, k, v, lse, delta, Block(band), AttentionSpec(scale))[:3]


FLASH, CUDNN = FlashAttention2Kernel(Aten()), CudnnKernel(Aten())
LENGTHS = st.sampled_from((1, 2, 7, 37)) | st.integers(1, 40)


@settings(max_examples=150)
@given(bands(), LENGTHS, LENGTHS)
def test_rows_and_columns_that_see_and_are_seen(band: Band, queries: int, keys: int) -> None:
    dense, part = band.dense(queries, keys), seen(band, queries, keys)
    if part is None:
        assert not dense.any()
        return
    rows, columns = dense.any(1).nonzero().flatten().tolist(), dense.any(0).nonzero().flatten().tolist()
    assert (rows, columns) == (list(range(part.q0, part.q1)), list(range(part.k0, part.k1)))
    inner = dense[part.q0 : part.q1, part.k0 : part.k1]
    assert torch.equal(part.band.dense(part.q1 - part.q0, part.k1 - part.k0), inner)
    assert inner[-1, -1], "windows aligned to the last query and key are not negative"


@settings(max_examples=150)
@given(bands(), LENGTHS, LENGTHS, st.integers(1, 2), st.integers(1, 2), st.booleans(), st.data())
def test_flash_under_any_band(
    band: Band, queries: int, keys: int, kv_heads: int, group: int, sinks: bool, data: st.DataObject
) -> None:
    case = Case(band, queries, keys, 2, kv_heads * group, kv_heads, 8, sinks=sinks, scale=data.draw(st.sampled_from((None, 0.3))))
    check_kernel(FLASH, case, torch.float64)


@settings(max_examples=100)
@given(st.sampled_from((Band.full(), Band.causal(), Band.causal(5), Band(-3, 4))), st.integers(1, 40), st.booleans(), st.data())
def test_flash_with_documents(band: Band, length: int, sinks: bool, data: st.DataObject) -> None:
    packed = data.draw(documents(2, length))
    check_kernel(FLASH, Case(band, length, None, 2, 4, 2, 8, q_documents=packed, sinks=sinks), torch.float64)


@settings(max_examples=100)
@given(st.integers(1, 40), st.integers(1, 40), st.booleans(), st.data())
def test_flash_with_documents_shared_in_part(queries: int, keys: int, sinks: bool, data: st.DataObject) -> None:
    """As the blocks of a ring between two shards."""
    ours, theirs = data.draw(documents(2, queries)), data.draw(documents(2, keys))
    case = Case(Band.full(), queries, keys, 2, 4, 2, 8, q_documents=ours, k_documents=theirs, sinks=sinks)
    check_kernel(FLASH, case, torch.float64)


@pytest.mark.parametrize("layout", [SequenceLayout.ZIGZAG, SequenceLayout.CONTIGUOUS])
@pytest.mark.parametrize("packed", [((24,),), ((3, 1, 9, 7),), ((5, 5, 5, 9),)])
def test_flash_in_a_ring_with_documents(layout: SequenceLayout, packed: tuple[tuple[int, ...], ...]) -> None:
    ranks, case = 3, Case(Band.causal(), 24, None, 1, 2, 1, 8, q_documents=packed)
    t = case.tensors(torch.float64)
    truth = results(naive_attention, t[:3], t.mask, t.spec, t.dout)

    def work(exchange: ThreadExchange) -> dict[str, Tensor]:
        q, k, v, dout = (layout.shard(x.detach(), ranks, exchange.rank) for x in t[:4])
        return results(RingAttend(FLASH, exchange, layout).with_lse, (q, k, v), t.mask, t.spec, dout)

    shards = run_ring(ranks, work).results
    for what, dim in {"out": 1, "lse": 2, "dq": 1, "dk": 1, "dv": 1}.items():
        torch.testing.assert_close(layout.unshard([shard[what] for shard in shards], dim=dim), truth[what])


@pytest.mark.parametrize("dimensions", [3, 4])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(37, 37), (2, 2), (20, 37), (37, 20), (1, 9)])
@pytest.mark.parametrize("band", [Band.full(), Band.causal(), Band(1, None)])
def test_cudnn(band: Band, queries: int, keys: int, sinks: bool, dimensions: int) -> None:
    part = seen(band, queries, keys)
    if part is not None and part.k1 - part.k0 == 1:
        with pytest.raises(KernelError, match="two keys or more"):
            check_kernel(CUDNN, Case(band, queries, keys, 2, 4, 2, 8), torch.float64)
        return
    check_kernel(CudnnKernel(Aten(dimensions)), Case(band, queries, keys, 2, 4, 2, 8, 16, sinks=sinks), torch.float64)


@pytest.mark.parametrize("kernel", [FLASH, CUDNN], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_projected_out_costs_no_precision(kernel: AttentionKernel, dtype: torch.dtype) -> None:
    for case in (Case(Band.causal(), 200, None, 1, 2, 2, 64), Case(Band.full(), 200, None, 1, 2, 2, 64, sinks=True)):
        check_kernel(kernel, case, dtype)
        t = case.tensors(dtype)  # gradients of many magnitudes, some rows without any
        dout = t.dout * torch.logspace(-6, 1, 200)[None, :, None, None].to(dtype)
        dout[:, ::7] = 0
        exact = case.in_dtype(t, torch.float64)
        truth = results(naive_attention, exact[:3], exact.mask, exact.spec, dout.double())
        low = results(LocalAttend(ReferenceKernel()).with_lse, t[:3], t.mask, t.spec, dout)
        fast = results(LocalAttend(kernel).with_lse, t[:3], t.mask, t.spec, dout)
        for name in truth:
            assert_close_to_truth(fast[name], truth[name], low[name], name)


def test_a_gradient_that_no_out_can_stand_for_is_not_a_number() -> None:
    """dout 0 and dlse not, in one row: rather NaN than a wrong gradient; everywhere else it is right."""
    case = Case(Band.causal(), 9, None, 1, 1, 1, 8)
    t = case.tensors(torch.float64)
    t.dout[:, 4] = 0
    got = results(LocalAttend(FLASH).with_lse, t[:3], t.mask, t.spec, t.dout, t.dlse)
    right = results(naive_attention, t[:3], t.mask, t.spec, t.dout, t.dlse)
    assert got["dq"][:, 4].isnan().all()
    others = [i for i in range(9) if i != 4]
    torch.testing.assert_close(got["dq"][:, others], right["dq"][:, others])
    t.dlse[:, :, 4] = 0
    got = results(LocalAttend(FLASH).with_lse, t[:3], t.mask, t.spec, t.dout, t.dlse)
    right = results(naive_attention, t[:3], t.mask, t.spec, t.dout, t.dlse)
    torch.testing.assert_close(got["dq"], right["dq"])


@pytest.mark.parametrize("kernel", [FLASH, CUDNN], ids=lambda kernel: kernel.name)
def test_merges_and_adds(kernel: AttentionKernel) -> None:
    """`into`, as a ring calls it, from slices: half of the keys after the other half."""
    t = Case(Band.causal(), 32, None, 2, 4, 2, 8).tensors(torch.float64)
    reference, spec = ReferenceKernel(), AttentionSpec()
    whole, lse = reference.forward(t.q, t.k, t.v, Block(Band.causal()), spec)
    into = empty_partial(t.q, 8)
    halves = (slice(0, 16), Band.causal()), (slice(16, 32), Band(16, None))
    for columns, band in halves:
        kernel.forward(t.q, t.k[:, columns], t.v[:, columns], Block(band), spec, into=into)
    torch.testing.assert_close(into.out, whole)
    torch.testing.assert_close(into.lse, lse)
    delta = kernel.delta(t.dout, whole, t.dlse)
    expected = reference.backward(t.dout, t.q, t.k, t.v, lse, delta, Block(Band.causal()), spec)
    grads = zero_grads(t.q, t.k, t.v)
    for columns, band in halves:
        part = grads._replace(dk=grads.dk[:, columns], dv=grads.dv[:, columns])
        kernel.backward(t.dout, t.q, t.k[:, columns], t.v[:, columns], lse, delta, Block(band), spec, into=part)
    for got, right in zip(grads[:3], expected[:3], strict=True):
        torch.testing.assert_close(got, right)


def test_any_memory_order() -> None:
    t = Case(Band.causal(), 20, None, 1, 2, 2, 8).tensors(torch.float64)
    turned = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in t[:4]]
    for kernel in (FLASH, CUDNN):
        plain, other = (
            results(LocalAttend(kernel).with_lse, xs[:3], t.mask, t.spec, xs[3], t.dlse) for xs in (t[:4], tuple(turned))
        )
        for name, value in plain.items():
            torch.testing.assert_close(other[name], value)


def test_the_operator_is_called_once_for_a_whole_block() -> None:
    for band, length in ((Band.full(), 16), (Band.causal(), 16)):
        for kernel in (FlashAttention2Kernel(Aten()), CudnnKernel(Aten(3))):
            t = Case(band, length, None, 1, 2, 2, 8).tensors(torch.float64)
            results(LocalAttend(kernel).with_lse, t[:3], t.mask, t.spec, t.dout, t.dlse)
            calls = [name for name in kernel.aten.calls if "backward" in name]
            assert len(calls) == 1


def test_refused_at_the_call() -> None:
    t = Case(Band.causal(), 8, None, 1, 1, 1, 8).tensors(torch.float64)
    ids = segments(((3, 5),), 8)

    def attend(kernel: AttentionKernel, mask: AttentionMask, spec: AttentionSpec | None = None) -> None:
        LocalAttend(kernel)(t.q, t.k, t.v, mask, spec or AttentionSpec())

    packed = AttentionMask(Band.causal(), ids, ids, boundaries(((3, 5),)))
    for kernel, mask, match in (
        (CUDNN, packed, "no packed documents"),
        (CUDNN, AttentionMask(Band.causal(3)), "full or causal"),
        (FLASH, AttentionMask(Band.causal(), ids, segments(((4, 4),), 8)), "self attention only"),
        (FLASH, AttentionMask(Band.causal(), ids.flip(1), ids.flip(1)), "not in order"),
        (FLASH, replace(packed, band=Band(1, None)), "full, causal or windowed"),
    ):
        with pytest.raises(KernelError, match=match):
            attend(kernel, mask)
    with pytest.raises(KernelError, match="no soft-cap"):
        attend(FLASH, AttentionMask(Band.causal()), AttentionSpec(softcap=1.0))
    with pytest.raises(KernelError, match="give them one dtype"):
        LocalAttend(FLASH)(t.q, t.k.float(), t.v, AttentionMask(Band.causal()))


NEEDS = Needs(frozenset(("causal", "full")), False, frozenset(), 64, 64, torch.bfloat16, "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks the GPU too")
@pytest.mark.parametrize(
    ("change", "flash", "cudnn"),
    [
        ({}, "", ""),
        ({"device": "cpu"}, "runs on CUDA GPUs", "runs on CUDA GPUs"),
        ({"dtype": torch.float32}, "not in float32", "not in float32"),
        ({"head_dim": 60, "value_dim": 60}, "multiples of 8", "multiples of 8"),
        ({"head_dim": 256, "value_dim": 256}, "", "up to 128 (cuDNN may have more"),
        ({"value_dim": 96}, "values of the head dimension", ""),
        ({"documents": True}, "", "no packed documents"),
        ({"documents": True, "kinds": frozenset(("causal", "band"))}, "packed documents under", "no window or other band"),
        ({"kinds": frozenset(("window",))}, "", "no window"),
        ({"fp32_partials": True}, "rounds partial results", "rounds partial results"),
        ({"features": frozenset(("dropout",))}, "dropout of its own", "dropout of its own"),
        ({"features": frozenset(("alibi",))}, "no ALiBi", "no ALiBi"),
        ({"features": frozenset(("bias",))}, "gradient of a bias", "gradient of a bias"),
    ],
)
def test_refuses(change: dict[str, Any], flash: str, cudnn: str) -> None:
    needs = replace(NEEDS, **change)
    for kernel, reason in ((FLASH, flash), (CUDNN, cudnn)):
        reasons = "; ".join(kernel.refuses(needs))
        assert reason in reasons
        assert bool(reason) == bool(reasons)
