from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longtrain.attention import Chunk, SequenceLayout

LAYOUTS = st.sampled_from(SequenceLayout)
RANKS = st.integers(1, 8)


@given(LAYOUTS, RANKS, st.integers(0, 100))
def test_every_position_lies_on_one_rank(layout: SequenceLayout, ranks: int, length: int) -> None:
    padded = layout.padded_length(length, ranks)
    chunks = [layout.chunks(padded, ranks, rank) for rank in range(ranks)]
    held = torch.cat([chunk.positions() for rank in chunks for chunk in rank])
    assert sorted(held.tolist()) == list(range(padded))
    assert len({sum(c.length for c in rank) for rank in chunks}) == 1
    assert len({c.stride for rank in chunks for c in rank}) == 1
    assert all(a.last < b.start for rank in chunks if padded for a, b in pairwise(rank))


@given(LAYOUTS, RANKS, st.integers(0, 100))
def test_padding_is_least(layout: SequenceLayout, ranks: int, length: int) -> None:
    padded = layout.padded_length(length, ranks)
    unit = 2 * ranks if layout is SequenceLayout.ZIGZAG and ranks > 1 else ranks
    assert length <= padded < length + unit
    assert padded % unit == 0
    assert layout.padded_length(padded, ranks) == padded


@given(LAYOUTS, RANKS, st.integers(1, 60), st.integers(0, 2))
def test_unshard_inverts_shard(layout: SequenceLayout, ranks: int, length: int, dim: int) -> None:
    padded = layout.padded_length(length, ranks)
    shape = [2, 3, 4]
    shape[dim] = padded
    x = torch.randn(shape)
    shards = [layout.shard(x, ranks, rank, dim) for rank in range(ranks)]
    assert torch.equal(layout.unshard(shards, dim=dim), x)
    assert torch.equal(layout.unshard(shards, length, dim), x.narrow(dim, 0, length))
    for rank, shard in enumerate(shards):
        positions = torch.cat([c.positions() for c in layout.chunks(padded, ranks, rank)])
        assert torch.equal(shard, x.index_select(dim, positions))


@pytest.mark.parametrize("layout", SequenceLayout)
def test_shard_and_unshard_carry_gradients(layout: SequenceLayout) -> None:
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 24, dtype=torch.float64)
    whole = layout.unshard([layout.shard(x, 4, rank) * (rank + 1) for rank in range(4)])
    (whole * weight).sum().backward()
    scale = layout.unshard([torch.full((2, 6), rank + 1.0, dtype=torch.float64) for rank in range(4)])
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight * scale)


def test_one_slice_is_a_view() -> None:
    x = torch.randn(2, 12)
    for layout in (SequenceLayout.CONTIGUOUS, SequenceLayout.STRIPED):
        assert layout.shard(x, 4, 1).data_ptr() != 0
        assert layout.shard(x, 4, 1)._base is x


def test_zigzag_is_the_usual_one() -> None:
    chunks = [SequenceLayout.ZIGZAG.chunks(16, 4, rank) for rank in range(4)]
    assert chunks == [(Chunk(0, 2), Chunk(14, 2)), (Chunk(2, 2), Chunk(12, 2)), (Chunk(4, 2), Chunk(10, 2)), (Chunk(6, 4),)]


def test_refuses_what_does_not_split() -> None:
    with pytest.raises(ValueError, match="12 positions do not split into a zigzag layout of 4 ranks"):
        SequenceLayout.ZIGZAG.chunks(12, 4, 0)
    for rank in (-1, 4):
        with pytest.raises(ValueError, match="of 4"):
            SequenceLayout.STRIPED.chunks(12, 4, rank)
