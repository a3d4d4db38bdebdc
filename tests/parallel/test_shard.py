from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longtrain.attention import Band, SequenceLayout
from longtrain.batch import IGNORE, PADDING, Batch
from longtrain.parallel.shard import pad_batch, shard_batch
from tests.attention_cases import Documents, boundaries, documents, segments


def batch_of(rows: Documents, length: int) -> Batch:
    """Labels as a loader makes them: the next token of the same document, nothing at its end."""
    ids = segments(rows, length)
    tokens = torch.randint(1, 1000, ids.shape)
    follows = torch.zeros_like(ids, dtype=torch.bool)
    follows[:, :-1] = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] != PADDING)
    labels = torch.where(follows, tokens.roll(-1, 1), IGNORE)
    positions = torch.zeros_like(tokens)
    for row, lengths in zip(positions, rows, strict=True):
        row[: sum(lengths)] = torch.cat([torch.arange(n) for n in (0, *lengths)])
    return Batch(tokens, labels, positions, ids, boundaries(rows))


@settings(max_examples=100)
@given(st.sampled_from(SequenceLayout), st.integers(1, 8), st.integers(1, 50), st.data())
def test_unshard_gives_the_batch_back(layout: SequenceLayout, ranks: int, length: int, data: st.DataObject) -> None:
    batch = batch_of(data.draw(documents(2, length)), length)
    shards = [shard_batch(batch, layout, ranks, rank, Band.causal(5)) for rank in range(ranks)]
    total = layout.padded_length(length, ranks)
    padding = {"tokens": 0, "labels": IGNORE, "positions": 0}
    for name, value in padding.items():
        whole = layout.unshard([getattr(s, name) for s in shards])
        assert whole.shape == (2, total)
        assert torch.equal(whole[:, :length], getattr(batch, name))
        assert (whole[:, length:] == value).all()
    assert sum(int((s.labels != IGNORE).sum()) for s in shards) == int((batch.labels != IGNORE).sum())
    expected = segments(batch_rows(batch), total)
    for shard in shards:
        assert shard.mask.band == Band.causal(5)
        if shard.mask.q_segments is None:
            assert (expected == 0).all(), "one document and no padding"
        else:
            assert torch.equal(shard.mask.q_segments, expected)
            assert shard.mask.k_segments is shard.mask.q_segments
            assert shard.mask.boundaries == batch.boundaries


def batch_rows(batch: Batch) -> Documents:
    return tuple(tuple(b - a for a, b in pairwise(row)) for row in batch.boundaries)


def test_padding() -> None:
    batch = batch_of(((3, 2),), 5)
    assert pad_batch(batch, 5) is batch
    longer = pad_batch(batch, 8)
    assert longer.segment_ids.tolist() == [[0, 0, 0, 1, 1, PADDING, PADDING, PADDING]]
    assert longer.segment_ids.dtype == torch.int32
    assert longer.boundaries == batch.boundaries
    with pytest.raises(ValueError, match="5 positions does not fit into 4"):
        pad_batch(batch, 4)


def test_a_padded_document_is_masked() -> None:
    """One document that fills its row needs no segments; one that had to be padded does."""
    whole = batch_of(((8,),), 8)
    assert shard_batch(whole, SequenceLayout.ZIGZAG, 2, 0, Band.causal()).mask.q_segments is None
    ids = shard_batch(whole, SequenceLayout.ZIGZAG, 3, 0, Band.causal()).mask.q_segments
    assert ids is not None
    assert ids.tolist() == [[0] * 8 + [PADDING] * 4]
