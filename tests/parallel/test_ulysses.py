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
from longtrain.parallel.exchange import ProcessGroupExchange
from longtrain.parallel.ring import RingAttend
from longtrain.parallel.ulysses import UlyssesAttend, UlyssesLayout, choose_attend, refuses_heads
from tests.attention_cases import Case, Tensors, bands, documents, segments
from tests.parity import assert_close_to_truth, assert_results_close, naive_attention, results
from tests.ring_threads import RingRun, ThreadExchange, run_ring

LAYOUTS = st.sampled_from(SequenceLayout)
REFERENCE = ReferenceKernel()
PADDED_DIM = {"out": 1, "lse": 2, "dq": 1, "dk": 1, "dv": 1}
GRIDS = ((1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (1, 3))
"""(ranks that share heads, groups in the ring)"""


@settings(max_examples=100)
@given(LAYOUTS, st.integers(1, 4), st.integers(1, 4), st.integers(1, 90), st.integers(0, 2))
def test_what_is_dealt_is_sewn(layout: SequenceLayout, size: int, groups: int, length: int, dim: int) -> None:
    dealt, ranks = UlyssesLayout(layout, size), size * groups
    padded = dealt.padded_length(length, ranks)
    assert length <= padded < length + 2 * ranks
    assert dealt.padded_length(padded, ranks) == padded
    shape = [2, 3, 4]
    shape[dim] = padded
    x = torch.randn(shape)
    shards = [dealt.shard(x, ranks, rank, dim) for rank in range(ranks)]
    assert torch.equal(dealt.unshard(shards, length, dim), x.narrow(dim, 0, length))
    for group in range(groups):
        own = torch.cat(shards[group * size : (group + 1) * size], dim)
        assert torch.equal(own, layout.shard(x, groups, group, dim)), "a group's shards are one of the ring's"
    if size == 1:
        assert padded == layout.padded_length(length, ranks)


def pad_to(x: Tensor, length: int, dim: int) -> Tensor:
    """Padding holds numbers that must not matter; but lse has a value there where there are sinks, so its gradient is 0."""
    shape = list(x.shape)
    shape[dim] = length - x.shape[dim]
    return torch.cat([x.detach(), torch.full(shape, 7.0 if x.ndim == 4 else 0.0, dtype=x.dtype)], dim)


def padded(case: Case, dealt: UlyssesLayout, ranks: int) -> Case:
    """Without documents nothing says what is padding, so lengths must be ones that the layout splits."""
    if case.q_documents is not None:
        return case
    keys = case.q_length if case.k_length is None else case.k_length
    lengths = (dealt.padded_length(n, ranks) for n in (case.q_length, keys))
    return replace(case, **dict(zip(("q_length", "k_length"), lengths, strict=True)))


def run(t: Tensors, dealt: UlyssesLayout, ranks: int, kernel: AttentionKernel = REFERENCE) -> RingRun[dict[str, Tensor]]:
    """`parity.results` of every rank."""
    queries, keys = (dealt.padded_length(x.shape[1], ranks) for x in (t.q, t.k))
    whole = [pad_to(x, n, d) for x, n, d in zip(t[:5], (queries, keys, keys, queries, queries), (1, 1, 1, 1, 2), strict=True)]

    def work(exchange: ThreadExchange) -> dict[str, Tensor]:
        q, k, v, dout, dlse = (dealt.shard(x, ranks, exchange.rank, dim) for x, dim in zip(whole, (1, 1, 1, 1, 2), strict=True))
        attend = UlyssesAttend(kernel, exchange, dealt.size, dealt.ring)
        return results(attend.with_lse, (q, k, v), t.mask, t.spec, dout, dlse)

    return run_ring(ranks, work)


def whole_results(t: Tensors, dealt: UlyssesLayout, ranks: int, kernel: AttentionKernel = REFERENCE) -> dict[str, Tensor]:
    shards = run(t, dealt, ranks, kernel).results
    lengths = {name: t.k.shape[1] if name in ("dk", "dv") else t.q.shape[1] for name in PADDED_DIM}
    whole = {name: dealt.unshard([s[name] for s in shards], lengths[name], dim) for name, dim in PADDED_DIM.items()}
    if t.spec.sinks is not None:  # every rank has the gradient of its own rows
        whole["dsinks"] = torch.stack([s["dsinks"] for s in shards]).sum(0)
    return whole


@st.composite
def problems(draw: st.DrawFn) -> tuple[Case, UlyssesLayout, int]:
    size, groups = draw(st.sampled_from(GRIDS))
    dealt = UlyssesLayout(draw(LAYOUTS), size)
    kv_heads = draw(st.sampled_from([n for n in (1, 2, 3, 4, 6, 8) if n % size == 0 or size % n == 0]))
    heads = kv_heads * size * draw(st.integers(1, 2)) if kv_heads % size else kv_heads * draw(st.integers(1, 3))
    length, cross = draw(st.sampled_from((1, 2, 7, 37)) | st.integers(1, 48)), draw(st.integers(0, 3)) == 0
    keys = draw(st.integers(1, 48)) if cross else length
    case = Case(
        draw(bands()),
        length,
        keys,
        draw(st.integers(1, 2)),
        heads,
        kv_heads,
        draw(st.sampled_from((1, 4))),
        draw(st.sampled_from((None, 6))),
        None,
        None,
        draw(st.sampled_from((None, 0.3))),
        draw(st.sampled_from((None, 1.5))),
        draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
        sinks=draw(st.booleans()),
    )
    if draw(st.booleans()):
        others = draw(documents(case.batch, keys)) if cross else None
        case = replace(case, q_documents=draw(documents(case.batch, length)), k_documents=others)
    return padded(case, dealt, size * groups), dealt, size * groups


@settings(max_examples=150)
@given(problems(), st.booleans())
def test_equals_dense_attention_in_fp64(problem: tuple[Case, UlyssesLayout, int], tiled: bool) -> None:
    case, dealt, ranks = problem
    t = case.tensors(torch.float64)
    dense = results(naive_attention, t[:3], t.mask, t.spec, t.dout, t.dlse)
    got = whole_results(t, dealt, ranks, MemoryEfficientKernel(5, 7) if tiled else REFERENCE)
    assert_results_close(got, dense, dense, noise=1e-12)


LONG = Case(Band.causal(), 256, None, 1, 8, 2, 32, q_documents=((100, 1, 0, 27, 128),))


@pytest.mark.parametrize(("size", "groups"), [(2, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize(
    "case", [LONG, replace(LONG, q_documents=None, band=Band.full()), replace(LONG, band=Band.causal(77), sinks=True)]
)
def test_bf16_loses_no_more_than_one_device(case: Case, size: int, groups: int) -> None:
    """Four ranks share two key heads in one case: their gradients are of copies."""
    dealt = UlyssesLayout(SequenceLayout.ZIGZAG, size)
    t = case.tensors(torch.bfloat16)
    exact = case.in_dtype(t, torch.float32)
    truth = results(naive_attention, exact[:3], exact.mask, exact.spec, exact.dout)
    local = results(LocalAttend(REFERENCE).with_lse, t[:3], t.mask, t.spec, t.dout)
    got = whole_results(t._replace(dlse=torch.zeros_like(t.dlse)), dealt, size * groups)
    for name in truth:
        assert got[name].dtype == local[name].dtype
        assert_close_to_truth(got[name], truth[name], local[name], name, factor=2.5, noise=2e-3)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_heads_are_computed_as_on_one_device(heads: tuple[int, int]) -> None:
    """Without a ring it is the kernel over the whole sequence; in a group of one, bit for bit."""
    t = Case(Band.causal(9), 32, None, 2, *heads, 8, q_documents=((20, 12), (5, 20))).tensors(torch.float32)
    local = results(LocalAttend(REFERENCE).with_lse, t[:3], t.mask, t.spec, t.dout, t.dlse)
    for size in (1, 2, 4):
        got = whole_results(t, UlyssesLayout(SequenceLayout.ZIGZAG, size), size)
        for name, value in got.items():
            torch.testing.assert_close(value, local[name], rtol=0, atol=0 if size == 1 else 1e-5)


def test_a_group_of_one_is_the_ring() -> None:
    t = Case(Band.causal(), 48, None, 1, 2, 2, 8).tensors(torch.float32)
    layout = SequenceLayout.ZIGZAG

    def work(exchange: ThreadExchange) -> dict[str, Tensor]:
        shards = [layout.shard(x, 3, exchange.rank, dim) for x, dim in zip(t[:5], (1, 1, 1, 1, 2), strict=True)]
        return results(RingAttend(REFERENCE, exchange, layout).with_lse, shards[:3], t.mask, t.spec, *shards[3:])

    ring, one = run_ring(3, work), run(t, UlyssesLayout(layout, 1), 3)
    assert ring.messages == one.messages
    for a, b in zip(ring.results, one.results, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kernel", [REFERENCE, MemoryEfficientKernel(8, 8)], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("layout", SequenceLayout)
@pytest.mark.parametrize(("size", "groups"), [(2, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("band", [Band.causal(), Band.causal(9)])
def test_nothing_leaks_between_documents(
    band: Band, size: int, groups: int, layout: SequenceLayout, kernel: AttentionKernel
) -> None:
    """One token of document 1 changes; bit for bit only what that document may know changes (TRL#6843)."""
    t = Case(band, 48, None, 1, 4, 2, q_documents=((11, 19, 1, 15),)).tensors(torch.float32)
    token, end = 17, 30
    reach = end if band.hi is None else min(end, token + band.hi + 1)
    dealt = UlyssesLayout(layout, size)
    before = whole_results(t, dealt, size * groups, kernel)
    for name in ("q", "k", "v"):
        changed = getattr(t, name).clone()
        changed[:, token] += 1
        after = whole_results(t._replace(**{name: changed}), dealt, size * groups, kernel)
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
@pytest.mark.parametrize("groups", [1, 2])
def test_recomputation_calls_no_kernel_and_sends_nothing(groups: int, sinks: bool) -> None:
    """With a Keep the heads of q, k and v are exchanged in the backward; without one they are kept, and exchanged twice."""
    size, layout = 2, SequenceLayout.ZIGZAG
    dealt, ranks = UlyssesLayout(layout, size), size * groups
    t = Case(Band.causal(), 32, sinks=sinks).tensors(torch.float32)
    plan = ring_plan(layout, 32, 32, groups, Band.causal())

    def work(exchange: ThreadExchange, keep: Keep | None, recompute: bool) -> tuple[int, tuple[Tensor, ...]]:
        kernel = Counting()
        attend = UlyssesAttend(kernel, exchange, size, layout)
        q, k, v = (dealt.shard(x, ranks, exchange.rank).clone().requires_grad_() for x in t[:3])

        def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, t.mask, t.spec, keep=keep).sin()

        out = checkpoint(block, q, k, v, use_reentrant=False) if recompute else block(q, k, v)
        assert isinstance(out, Tensor)
        gradients = torch.autograd.grad(out.sum(), (q, k, v) if t.spec.sinks is None else (q, k, v, t.spec.sinks))
        return kernel.forwards, gradients

    plain = run_ring(ranks, lambda exchange: work(exchange, None, False))
    kept = run_ring(ranks, lambda exchange: work(exchange, Keep(), True))
    again = run_ring(ranks, lambda exchange: work(exchange, None, True))
    pairs, hops = (
        ranks * (size - 1),
        size * sum(bool(blocks) for i, row in enumerate(plan) for j, blocks in enumerate(row) if i != j),
    )
    assert plain.messages == pairs * (3 + 2 + 2 + 3) + 6 * hops
    assert kept.messages == plain.messages + pairs * 3
    assert again.messages == plain.messages + pairs * 5 + 2 * hops
    for rank, found in enumerate(zip(plain.results, kept.results, again.results, strict=True)):
        (once, expected), (also_once, gradients), (twice, computed) = found
        assert once == also_once == (1 if groups == 1 else sum(len(blocks) for blocks in plan[rank // size]))
        assert twice == 2 * once
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(expected, gradients, computed, strict=True))


def test_two_runs_are_equal_bit_for_bit() -> None:
    t = Case(Band.causal(), 40, None, 1, 4, 1, 8, q_documents=((25, 15),), sinks=True).tensors(torch.float32)
    dealt = UlyssesLayout(SequenceLayout.ZIGZAG, 2)
    first, second = (whole_results(t, dealt, 4) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tensors_in_any_memory_order_travel() -> None:
    t = Case(Band.causal(), 32, heads=4, kv_heads=4).tensors(torch.float64)
    dealt = UlyssesLayout(SequenceLayout.ZIGZAG, 2)
    plain = whole_results(t._replace(dlse=torch.zeros_like(t.dlse)), dealt, 4)

    def work(exchange: ThreadExchange) -> tuple[Tensor, ...]:
        q, k, v, dout = (dealt.shard(x, 4, exchange.rank) for x in t[:4])
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k))
        v = torch.cat([v, v], -1)[..., :8].requires_grad_()
        out = UlyssesAttend(REFERENCE, exchange, 2)(q, k, v, t.mask)
        return out, *torch.autograd.grad(out, (q, k, v), dout.transpose(1, 3).contiguous().transpose(1, 3))

    shards = run_ring(4, work).results
    for i, name in enumerate(("out", "dq", "dk", "dv")):
        torch.testing.assert_close(dealt.unshard([s[i] for s in shards]), plain[name], rtol=0, atol=1e-13)


def test_without_gradients() -> None:
    t = Case(Band.causal(), 32).tensors(torch.float32)
    dealt = UlyssesLayout(SequenceLayout.CONTIGUOUS, 2)

    def work(exchange: ThreadExchange) -> Tensor:
        q, k, v = (dealt.shard(x, 2, exchange.rank).requires_grad_() for x in t[:3])
        with torch.no_grad():
            return UlyssesAttend(REFERENCE, exchange, 2, dealt.ring)(q, k, v, t.mask)

    out, _ = naive_attention(t.q, t.k, t.v, t.mask, t.spec)
    torch.testing.assert_close(dealt.unshard(run_ring(2, work).results), out)


def test_refusals() -> None:
    def attend(case: Case, spec: AttentionSpec | None = None, mask: AttentionMask | None = None, size: int = 2) -> None:
        t = case.tensors(torch.float32)
        run_ring(
            size,
            lambda exchange: UlyssesAttend(REFERENCE, exchange, size)(t.q, t.k, t.v, mask or t.mask, spec or t.spec),
        )

    with pytest.raises(KernelError, match="3 query heads do not split over 2 ranks"):
        attend(Case(q_length=8, heads=3, kv_heads=3))
    with pytest.raises(KernelError, match="6 key-value heads neither split over 4 ranks nor"):
        attend(Case(q_length=8, heads=12, kv_heads=6), size=4)
    with pytest.raises(KernelError, match="takes no bias tensor"):
        attend(Case(q_length=8), AttentionSpec(bias=torch.zeros(16, 16)))
    with pytest.raises(KernelError, match="takes no dropout"):
        attend(Case(q_length=8, dropout=0.1))
    ids = segments(((17,), (4,)), 17)
    with pytest.raises(ValueError, match="the mask describes 17 positions, the shards of all ranks hold 16"):
        attend(Case(q_length=8), mask=AttentionMask(Band.causal(), ids, ids))
    assert refuses_heads(8, 2, 4) is None


def test_the_attend_of_a_rank() -> None:
    alone = ProcessGroupExchange(None)
    assert choose_attend(REFERENCE, alone, SequenceLayout.ZIGZAG, 1) == LocalAttend(REFERENCE)

    def work(exchange: ThreadExchange) -> tuple[Any, Any]:
        ring = choose_attend(REFERENCE, exchange, SequenceLayout.STRIPED, 1)
        return ring == RingAttend(REFERENCE, exchange, SequenceLayout.STRIPED), choose_attend(
            REFERENCE, exchange, SequenceLayout.STRIPED, 2
        ) == UlyssesAttend(REFERENCE, exchange, 2, SequenceLayout.STRIPED)

    assert run_ring(2, work).results == [(True, True)] * 2
