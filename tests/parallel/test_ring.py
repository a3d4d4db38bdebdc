from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longtrain.attention import AttentionKernel, AttentionMask, AttentionSpec, Band, Keep, SequenceLayout, ring_plan
from longtrain.attention.reference import ReferenceKernel
from longtrain.errors import KernelError
from longtrain.kernels.local import LocalAttend
from longtrain.kernels.memory_efficient import MemoryEfficientKernel
from longtrain.parallel.ring import RingAttend
from tests.attention_cases import Case, Tensors, bands, cases, documents, segments
from tests.parity import assert_close_to_truth, assert_results_close, naive_attention, results
from tests.ring_threads import RingRun, ThreadExchange, run_ring

LAYOUTS = st.sampled_from(SequenceLayout)
REFERENCE = ReferenceKernel()
PADDED_DIM = {"out": 1, "lse": 2, "dq": 1, "dk": 1, "dv": 1}


def padded(case: Case, layout: SequenceLayout, ranks: int) -> Case:
    """Without documents nothing says what is padding, so lengths must be ones that the layout splits."""
    if case.q_documents is not None:
        return case
    keys = case.q_length if case.k_length is None else case.k_length
    lengths = (layout.padded_length(n, ranks) for n in (case.q_length, keys))
    return replace(case, **dict(zip(("q_length", "k_length"), lengths, strict=True)))


def pad_to(x: Tensor, length: int, dim: int) -> Tensor:
    """Padding holds numbers that must not matter; but lse has a value there where there are sinks, so its gradient is 0."""
    shape = list(x.shape)
    shape[dim] = length - x.shape[dim]
    return torch.cat([x.detach(), torch.full(shape, 7.0 if x.ndim == 4 else 0.0, dtype=x.dtype)], dim)


def run(t: Tensors, layout: SequenceLayout, ranks: int, kernel: AttentionKernel = REFERENCE) -> RingRun[dict[str, Tensor]]:
    """`parity.results` of every rank."""
    queries, keys = (layout.padded_length(x.shape[1], ranks) for x in (t.q, t.k))
    whole = [pad_to(x, n, d) for x, n, d in zip(t[:5], (queries, keys, keys, queries, queries), (1, 1, 1, 1, 2), strict=True)]

    def work(exchange: ThreadExchange) -> dict[str, Tensor]:
        q, k, v, dout, dlse = (layout.shard(x, ranks, exchange.rank, dim) for x, dim in zip(whole, (1, 1, 1, 1, 2), strict=True))
        return results(RingAttend(kernel, exchange, layout).with_lse, (q, k, v), t.mask, t.spec, dout, dlse)

    return run_ring(ranks, work)


def whole_results(t: Tensors, layout: SequenceLayout, ranks: int, kernel: AttentionKernel = REFERENCE) -> dict[str, Tensor]:
    shards = run(t, layout, ranks, kernel).results
    lengths = {name: t.k.shape[1] if name in ("dk", "dv") else t.q.shape[1] for name in PADDED_DIM}
    whole = {name: layout.unshard([s[name] for s in shards], lengths[name], dim) for name, dim in PADDED_DIM.items()}
    if t.spec.sinks is not None:  # every rank has the gradient of its own rows
        whole["dsinks"] = torch.stack([s["dsinks"] for s in shards]).sum(0)
    return whole


@settings(max_examples=150)
@given(cases(bias=False), LAYOUTS, st.integers(1, 4), st.booleans())
def test_equals_dense_attention_in_fp64(case: Case, layout: SequenceLayout, ranks: int, tiled: bool) -> None:
    t = padded(case, layout, ranks).tensors(torch.float64)
    dense = results(naive_attention, t[:3], t.mask, t.spec, t.dout, t.dlse)
    ring = whole_results(t, layout, ranks, MemoryEfficientKernel(5, 7) if tiled else REFERENCE)
    assert_results_close(ring, dense, dense, noise=1e-12)


@settings(max_examples=40)
@given(cases(bias=False), LAYOUTS, st.integers(2, 4))
def test_equals_dense_attention_in_fp32(case: Case, layout: SequenceLayout, ranks: int) -> None:
    case = padded(case, layout, ranks)
    t = case.tensors(torch.float32)
    exact = case.in_dtype(t, torch.float64)
    truth = results(naive_attention, exact[:3], exact.mask, exact.spec, exact.dout, exact.dlse)
    plain = results(naive_attention, t[:3], t.mask, t.spec, t.dout, t.dlse)
    assert_results_close(whole_results(t, layout, ranks), truth, plain)


LONG = Case(Band.causal(), 256, None, 1, 4, 2, 32, q_documents=((100, 1, 0, 27, 128),))


@pytest.mark.parametrize("layout", SequenceLayout)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    "case",
    [
        LONG,
        replace(LONG, band=Band.causal(77)),
        replace(LONG, q_documents=None, band=Band.full()),
        replace(LONG, band=Band.causal(77), sinks=True),
    ],
)
def test_bf16_loses_no_more_than_one_device(case: Case, layout: SequenceLayout, ranks: int) -> None:
    """ring error <= 2.5 * local error + 2e-3 (ring-flash-attention#42): partial results are fp32."""
    t = case.tensors(torch.bfloat16)
    exact = case.in_dtype(t, torch.float32)
    truth = results(naive_attention, exact[:3], exact.mask, exact.spec, exact.dout)
    local = results(LocalAttend(REFERENCE).with_lse, t[:3], t.mask, t.spec, t.dout)
    ring = whole_results(t._replace(dlse=torch.zeros_like(t.dlse)), layout, ranks)
    for name in truth:
        assert ring[name].dtype == local[name].dtype
        assert_close_to_truth(ring[name], truth[name], local[name], name, factor=2.5, noise=2e-3)


@settings(max_examples=60)
@given(LAYOUTS, st.integers(2, 4), bands(), st.integers(1, 40), st.data())
def test_only_shards_that_are_needed_travel(
    layout: SequenceLayout, ranks: int, band: Band, length: int, data: st.DataObject
) -> None:
    case = padded(Case(band, length, batch=1, q_documents=data.draw(st.none() | documents(1, length))), layout, ranks)
    t = case.tensors(torch.float32)
    total = layout.padded_length(case.q_length, ranks)
    plan = ring_plan(layout, total, total, ranks, band, t.mask.boundaries)
    hops = sum(bool(plan[rank][source]) for rank in range(ranks) for source in range(ranks) if rank != source)
    assert run(t, layout, ranks).messages == 6 * hops, "keys and values twice, and the gradients of both"


def test_documents_that_do_not_cross_send_nothing() -> None:
    aligned = Case(Band.causal(), 32, batch=2, q_documents=((8, 8, 8, 8), (3, 5, 8, 8, 8)))
    assert run(aligned.tensors(torch.float32), SequenceLayout.CONTIGUOUS, 4).messages == 0
    crossing = replace(aligned, q_documents=((8, 9, 7, 8), (3, 5, 8, 8, 8)))
    assert run(crossing.tensors(torch.float32), SequenceLayout.CONTIGUOUS, 4).messages == 6
    window = Case(Band.causal(8), 32)
    assert run(window.tensors(torch.float32), SequenceLayout.CONTIGUOUS, 4).messages == 18


@pytest.mark.parametrize("kernel", [REFERENCE, MemoryEfficientKernel(8, 8)], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("layout", SequenceLayout)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("band", [Band.causal(), Band.causal(9)])
def test_nothing_leaks_between_documents(
    band: Band, ranks: int, layout: SequenceLayout, kernel: ReferenceKernel | MemoryEfficientKernel
) -> None:
    """One token of document 1 changes; bit for bit only what that document may know changes (TRL#6843)."""
    t = Case(band, 48, batch=1, q_documents=((11, 19, 1, 15),)).tensors(torch.float32)
    token, end = 17, 30
    reach = end if band.hi is None else min(end, token + band.hi + 1)
    before = whole_results(t, layout, ranks, kernel)
    for name in ("q", "k", "v"):
        changed = getattr(t, name).clone()
        changed[:, token] += 1
        after = whole_results(t._replace(**{name: changed}), layout, ranks, kernel)
        moved = (after["out"] != before["out"]).flatten(2).any(-1)[0].nonzero().flatten().tolist()
        assert moved == ([token] if name == "q" else list(range(token, reach)))
        for gradient in ("dq", "dk", "dv"):
            moved = (after[gradient] != before[gradient]).flatten(2).any(-1)[0]
            assert moved.any() or (name, gradient) == ("v", "dv")
            assert not moved[:11].any()
            assert not moved[end:].any()


class Counting(ReferenceKernel):
    def __init__(self) -> None:
        self.forwards = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.forwards += 1
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("layout", SequenceLayout)
def test_recomputation_calls_no_kernel_and_sends_nothing(layout: SequenceLayout, sinks: bool) -> None:
    t = Case(Band.causal(), 32, sinks=sinks).tensors(torch.float32)
    plan = ring_plan(layout, 32, 32, 4, Band.causal())

    def work(exchange: ThreadExchange, keep: Keep | None) -> tuple[int, tuple[Tensor, ...]]:
        kernel = Counting()
        attend = RingAttend(kernel, exchange, layout)
        q, k, v = (layout.shard(x, 4, exchange.rank).clone().requires_grad_() for x in t[:3])
        out = checkpoint(lambda q, k, v: attend(q, k, v, t.mask, t.spec, keep=keep).sin(), q, k, v, use_reentrant=False)
        assert isinstance(out, Tensor)
        gradients = torch.autograd.grad(out.sum(), (q, k, v) if t.spec.sinks is None else (q, k, v, t.spec.sinks))
        return kernel.forwards, gradients

    kept = run_ring(4, lambda exchange: work(exchange, Keep()))
    again = run_ring(4, lambda exchange: work(exchange, None))
    hops = 6 * sum(bool(blocks) for row in plan for blocks in row) - 6 * 4
    assert kept.messages == hops
    assert again.messages == hops + hops // 3
    for rank, ((once, gradients), (twice, computed)) in enumerate(zip(kept.results, again.results, strict=True)):
        assert once == sum(len(blocks) for blocks in plan[rank])
        assert twice == 2 * once
        assert all(torch.equal(a, b) for a, b in zip(gradients, computed, strict=True))


def test_keys_in_any_memory_order_travel() -> None:
    """Views of [B, H, T, D] tensors and of one product of queries, keys and values: what is sent must still be contiguous."""
    t = Case(Band.causal(), 32, heads=4, kv_heads=4).tensors(torch.float64)
    expected = whole_results(t, SequenceLayout.ZIGZAG, 4)

    def work(exchange: ThreadExchange) -> tuple[Tensor, ...]:
        q, k, v, dout = (SequenceLayout.ZIGZAG.shard(x, 4, exchange.rank) for x in t[:4])
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k))
        v = torch.cat([v, v], -1)[..., :8].requires_grad_()
        out = RingAttend(REFERENCE, exchange)(q, k, v, t.mask)
        dout = dout.transpose(1, 3).contiguous().transpose(1, 3)
        return out, *torch.autograd.grad(out, (q, k, v), dout)

    shards = run_ring(4, work).results
    plain = whole_results(t._replace(dlse=torch.zeros_like(t.dlse)), SequenceLayout.ZIGZAG, 4)
    torch.testing.assert_close(expected["out"], plain["out"])
    for i, name in enumerate(("out", "dq", "dk", "dv")):
        whole = SequenceLayout.ZIGZAG.unshard([s[i] for s in shards])
        torch.testing.assert_close(whole, plain[name], rtol=0, atol=1e-13)


def test_without_gradients() -> None:
    t = Case(Band.causal(), 32).tensors(torch.float32)

    def work(exchange: ThreadExchange) -> Tensor:
        q, k, v = (SequenceLayout.ZIGZAG.shard(x, 4, exchange.rank).requires_grad_() for x in t[:3])
        with torch.no_grad():
            out = RingAttend(REFERENCE, exchange)(q, k, v, t.mask)
        assert not out.requires_grad
        return out

    done = run_ring(4, work)
    assert done.messages == 2 * 12
    out, _ = naive_attention(t.q, t.k, t.v, t.mask, t.spec)
    torch.testing.assert_close(SequenceLayout.ZIGZAG.unshard(done.results), out)


def test_refusals() -> None:
    t = Case(Band.causal(), 8).tensors(torch.float32)

    def attend(mask: AttentionMask, spec: AttentionSpec) -> None:
        run_ring(1, lambda exchange: RingAttend(REFERENCE, exchange)(t.q, t.k, t.v, mask, spec))

    with pytest.raises(KernelError, match="ring attention takes no bias tensor"):
        attend(t.mask, AttentionSpec(bias=torch.zeros(8, 8)))
    with pytest.raises(KernelError, match="a mask with q_start 3 is for one device"):
        attend(replace(t.mask, q_start=3), AttentionSpec())
    ids = segments(((9,), (4,)), 9)
    with pytest.raises(ValueError, match="the mask describes 9 positions, the shards of all ranks hold 8"):
        attend(AttentionMask(Band.causal(), ids, ids), AttentionSpec())
