from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longtrain.attention import AttentionMask, Band, BlockPlan, Chunk, SequenceLayout, plan_step, ring_plan
from longtrain.kernels.registry import kinds_of
from tests.attention_cases import Documents, bands, boundaries, documents, segments

Table = tuple[tuple[tuple[BlockPlan, ...], ...], ...]


def positions(layout: SequenceLayout, length: int, ranks: int, rank: int) -> Tensor:
    return torch.cat([c.positions() for c in layout.chunks(length, ranks, rank)])


def times_seen(plan: Table, layout: SequenceLayout, q_length: int, k_length: int, allowed: Tensor) -> Tensor:
    """int [B, Tq, Tk]: how many blocks hold each pair and let it through; `allowed` [B, Tq, Tk]: what documents let through."""
    count = torch.zeros_like(allowed, dtype=torch.int64)
    for rank, row in enumerate(plan):
        for source, blocks in enumerate(row):
            i, j = positions(layout, q_length, len(plan), rank), positions(layout, k_length, len(plan), source)
            for b in blocks:
                rows, columns = i[b.q0 : b.q1], j[b.k0 : b.k1]
                rectangle = rows[:, None], columns[None, :]
                count[:, *rectangle] += b.band.dense(len(rows), len(columns)) & allowed[:, *rectangle]
    return count


@settings(max_examples=300)
@given(st.sampled_from(SequenceLayout), st.integers(1, 8), bands(), st.integers(1, 40), st.booleans(), st.data())
def test_blocks_hold_each_visible_pair_once(
    layout: SequenceLayout, ranks: int, band: Band, length: int, positional: bool, data: st.DataObject
) -> None:
    rows: Documents | None = data.draw(st.none() | documents(2, length))
    padded = layout.padded_length(length, ranks)
    ids = None if rows is None else segments(rows, padded)
    allowed = AttentionMask(Band.full(), ids, ids).dense(padded, padded)
    plan = ring_plan(layout, padded, padded, ranks, band, None if rows is None else boundaries(rows), positional)
    seen = times_seen(plan, layout, padded, padded, allowed)
    assert torch.equal(seen, AttentionMask(band, ids, ids).dense(padded, padded).long())


@settings(max_examples=100)
@given(st.sampled_from(SequenceLayout), st.integers(1, 5), bands(), st.integers(1, 30), st.integers(1, 30), st.booleans())
def test_other_numbers_of_keys(layout: SequenceLayout, ranks: int, band: Band, queries: int, keys: int, positional: bool) -> None:
    queries, keys = layout.padded_length(queries, ranks), layout.padded_length(keys, ranks)
    plan = ring_plan(layout, queries, keys, ranks, band, None, positional)
    everything = torch.ones(1, queries, keys, dtype=torch.bool)
    assert torch.equal(times_seen(plan, layout, queries, keys, everything)[0], band.dense(queries, keys).long())


@settings(max_examples=100)
@given(st.sampled_from(SequenceLayout), st.integers(1, 6), bands(), st.integers(1, 40))
def test_positional_blocks_are_progressions_of_positions(layout: SequenceLayout, ranks: int, band: Band, length: int) -> None:
    length = layout.padded_length(length, ranks)
    for rank, row in enumerate(ring_plan(layout, length, length, ranks, band, None, True)):
        for source, blocks in enumerate(row):
            for b in blocks:
                q, k = positions(layout, length, ranks, rank)[b.q0 : b.q1], positions(layout, length, ranks, source)[b.k0 : b.k1]
                assert torch.equal(q, b.q_start + b.stride * torch.arange(len(q)))
                assert torch.equal(k, b.k_start + b.stride * torch.arange(len(k)))


@settings(max_examples=100)
@given(st.sampled_from(SequenceLayout), st.integers(1, 6), bands(), st.integers(1, 40))
def test_full_blocks_say_so_and_empty_ones_are_left_out(layout: SequenceLayout, ranks: int, band: Band, length: int) -> None:
    length = layout.padded_length(length, ranks)
    for row in ring_plan(layout, length, length, ranks, band):
        for b in (b for blocks in row for b in blocks):
            dense = b.band.dense(b.q1 - b.q0, b.k1 - b.k0)
            assert dense.any()
            assert b.band == Band.full() or not dense.all() or b.band == Band.causal()


def test_only_neighbours_are_glued() -> None:
    queries = (Chunk(100, 4),)
    blocks = plan_step(queries, (Chunk(0, 2), Chunk(50, 3), Chunk(200, 5), Chunk(10, 1)), Band.causal())
    assert [(b.k0, b.k1, b.band) for b in blocks] == [(0, 5, Band.full()), (10, 11, Band.full())]


def calls(layout: SequenceLayout, ranks: int, band: Band, positional: bool = False) -> list[int]:
    plan = ring_plan(layout, 64 * ranks, 64 * ranks, ranks, band, None, positional)
    return [sum(len(blocks) for blocks in row) for row in plan]


def test_kernel_calls_per_rank() -> None:
    contiguous, zigzag, striped = SequenceLayout.CONTIGUOUS, SequenceLayout.ZIGZAG, SequenceLayout.STRIPED
    for ranks in (1, 2, 3, 4, 8):
        assert calls(contiguous, ranks, Band.causal()) == list(range(1, ranks + 1))
        assert calls(zigzag, ranks, Band.causal()) == [ranks] * ranks, "the hand-written zigzag"
        assert calls(striped, ranks, Band.causal()) == [ranks] * ranks
        for layout in SequenceLayout:
            assert calls(layout, ranks, Band.full()) == [ranks] * ranks
    assert calls(zigzag, 4, Band.causal(), positional=True) == [8, 8, 8, 4]
    # a window that reaches one shard back
    assert calls(contiguous, 4, Band.causal(64)) == [1, 2, 2, 2]
    assert calls(zigzag, 4, Band.causal(64)) == [4, 5, 5, 3]
    assert calls(striped, 4, Band.causal(64)) == [4, 4, 4, 4]


def work(layout: SequenceLayout, band: Band) -> list[float]:
    """Visible pairs of ranks 0 to 3 of 4, in squares of a rank's shard."""
    plan = ring_plan(layout, 1024, 1024, 4, band)
    pairs = [sum(int(b.band.dense(b.q1 - b.q0, b.k1 - b.k0).sum()) for blocks in row for b in blocks) for row in plan]
    return [p / 256**2 for p in pairs]


def test_work_per_rank() -> None:
    """The table of docs/attention.md."""
    contiguous, zigzag, striped = SequenceLayout.CONTIGUOUS, SequenceLayout.ZIGZAG, SequenceLayout.STRIPED
    assert work(contiguous, Band.causal()) == pytest.approx([0.5, 1.5, 2.5, 3.5], abs=0.01)
    assert work(zigzag, Band.causal()) == pytest.approx([2] * 4, abs=0.01)
    assert work(striped, Band.causal()) == pytest.approx([2] * 4, abs=0.01)
    assert work(contiguous, Band.causal(256)) == pytest.approx([0.5, 1, 1, 1], abs=0.01)
    assert work(zigzag, Band.causal(256)) == pytest.approx([0.625, 0.875, 1, 1], abs=0.01)
    assert work(striped, Band.causal(256)) == pytest.approx([0.875] * 4, abs=0.01)


@pytest.mark.parametrize("layout", SequenceLayout)
def test_kinds_that_a_kernel_must_do(layout: SequenceLayout) -> None:
    plan = ring_plan(layout, 64, 64, 4, Band.causal())
    kinds = kinds_of(b.band for row in plan for blocks in row for b in blocks)
    assert kinds == ({"causal", "band"} if layout is SequenceLayout.STRIPED else {"causal", "full"})


def test_documents_that_do_not_cross_need_no_exchange() -> None:
    rows = ((8, 8, 8, 8), (3, 5, 8, 8, 4))
    plan = ring_plan(SequenceLayout.CONTIGUOUS, 32, 32, 4, Band.causal(), boundaries(rows))
    assert [[bool(blocks) for blocks in row] for row in plan] == torch.eye(4, dtype=torch.bool).tolist()


def test_a_document_that_crosses_is_exchanged() -> None:
    plan = ring_plan(SequenceLayout.CONTIGUOUS, 32, 32, 4, Band.causal(), ((8, 16, 24), (0, 7, 9, 24)))
    assert [[bool(blocks) for blocks in row] for row in plan] == [
        [True, False, False, False],
        [True, True, False, False],
        [False, True, True, False],
        [False, False, False, False],
    ]


def test_planning_is_cheap_for_many_ranks_and_documents() -> None:
    ring_plan.cache_clear()
    bounds = (tuple(range(0, 2**20 + 1, 512)),)
    plan = ring_plan(SequenceLayout.ZIGZAG, 2**20, 2**20, 64, Band.causal(), bounds)
    assert sum(len(blocks) for row in plan for blocks in row) == 64
