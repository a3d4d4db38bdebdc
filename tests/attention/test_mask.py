from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longtrain.attention import AttentionMask, AttentionSpec, Band, Block, Chunk, Cover, band_kind
from longtrain.attention.mask import LAST_DOCUMENT
from longtrain.batch import Batch
from tests.attention_cases import bands, boundaries, documents, segments

SIZES = st.integers(0, 12)


def brute(band: Band, q: list[int], k: list[int]) -> torch.Tensor:
    """Pair by pair, from the definition."""

    def sees(i: int, j: int) -> bool:
        return (band.lo is None or band.lo <= i - j) and (band.hi is None or i - j <= band.hi)

    return torch.tensor([[sees(i, j) for j in k] for i in q], dtype=torch.bool).view(len(q), len(k))


@given(bands(14), SIZES, SIZES)
def test_dense_and_cover(band: Band, queries: int, keys: int) -> None:
    dense = band.dense(queries, keys)
    assert torch.equal(dense, brute(band, list(range(queries)), list(range(keys))))
    cover = band.cover(queries, keys)
    if queries == 0 or keys == 0:
        assert cover is Cover.EMPTY
    else:
        assert (cover is Cover.EMPTY) == (not dense.any())
        assert (cover is Cover.FULL) == bool(dense.all())


@given(bands(40), st.integers(1, 5), st.data())
def test_between_is_the_same_mask(band: Band, stride: int, data: st.DataObject) -> None:
    q, k = (Chunk(data.draw(st.integers(0, 30)), data.draw(st.integers(1, 10)), stride) for _ in range(2))
    assert torch.equal(band.between(q, k).dense(q.length, k.length), brute(band, q.positions().tolist(), k.positions().tolist()))


@given(bands(14), st.integers(0, 8), st.integers(0, 8), SIZES, SIZES)
def test_shift_is_a_sub_rectangle(band: Band, q0: int, k0: int, queries: int, keys: int) -> None:
    assert torch.equal(band.shift(q0, k0).dense(queries, keys), band.dense(q0 + queries, k0 + keys)[q0:, k0:])


def test_the_window_counts_the_query_itself() -> None:
    assert torch.equal(Band.causal(1).dense(5, 5), torch.eye(5, dtype=torch.bool))
    assert Band.causal(3).dense(9, 9).sum(1).tolist() == [1, 2, 3, 3, 3, 3, 3, 3, 3]
    with pytest.raises(ValueError, match="at least 1"):
        Band.causal(0)


def test_causal_bottom_right() -> None:
    assert torch.equal(Band.causal_bottom_right(2, 5).dense(2, 5), torch.ones(2, 5, dtype=torch.bool).tril(3))


def test_chunks_of_other_strides_are_refused() -> None:
    with pytest.raises(ValueError, match="strides 1 and 2"):
        Band.full().between(Chunk(0, 4), Chunk(0, 4, 2))


def test_kinds() -> None:
    kinds = {Band.full(): "full", Band.causal(): "causal", Band.causal(4): "window", Band(1, None): "band", Band(None, 0): "band"}
    assert {band: band_kind(band) for band in kinds} == kinds


@given(bands(14), st.integers(1, 12), st.data())
def test_documents(band: Band, length: int, data: st.DataObject) -> None:
    rows = data.draw(documents(2, length))
    ids = segments(rows, length)
    dense = AttentionMask(band, ids, ids).dense(length, length)
    for row, one in zip(ids.tolist(), dense, strict=True):
        same = torch.tensor([[a == b != -1 for b in row] for a in row])
        assert torch.equal(one, band.dense(length, length) & same)


@given(bands(14), st.data())
def test_narrowed_blocks_are_parts_of_the_whole(band: Band, data: st.DataObject) -> None:
    block = Block(band, torch.arange(9)[None] // 2, torch.arange(7)[None] // 3, q_start=5, k_start=2, stride=3)
    q0, k0 = data.draw(st.integers(0, 8)), data.draw(st.integers(0, 6))
    part = block.narrow(q0, 9 - q0, k0, 7 - k0)
    cpu = torch.device("cpu")
    assert torch.equal(part.q_positions(9 - q0, cpu), block.q_positions(9, cpu)[q0:])
    assert torch.equal(part.k_positions(7 - k0, cpu), block.k_positions(7, cpu)[k0:])
    assert part.q_segments is not None
    assert part.k_segments is not None
    seen = AttentionMask(part.band, part.q_segments, part.k_segments).dense(9 - q0, 7 - k0)
    assert torch.equal(seen, AttentionMask(band, block.q_segments, block.k_segments).dense(9, 7)[:, q0:, k0:])


def batch_of(rows: tuple[tuple[int, ...], ...], length: int) -> Batch:
    zeros = torch.zeros(len(rows), length, dtype=torch.int64)
    return Batch(zeros, zeros, zeros, segments(rows, length), boundaries(rows))


def test_a_batch_of_whole_documents_needs_no_segments() -> None:
    mask = AttentionMask.of(batch_of(((6,), (6,)), 6), Band.causal())
    assert mask.q_segments is None
    assert mask.boundaries is None
    for rows in (((6,), (5,)), ((6,), (2, 4)), ((6,), ())):
        mask = AttentionMask.of(batch_of(rows, 6), Band.causal())
        assert mask.q_segments is mask.k_segments is not None
        assert mask.boundaries == boundaries(rows)


def test_packed_lengths_are_a_mask() -> None:
    mask = AttentionMask.packed(Band.causal(), [[3, 1, 2], [4]])
    wanted = ((3, 1, 2), (4,))
    assert mask.q_segments is not None
    assert mask.q_segments is mask.k_segments
    assert torch.equal(mask.q_segments, segments(wanted, 6))
    assert mask.boundaries == boundaries(wanted)
    assert mask.to("meta").boundaries == mask.boundaries
    wrong: Any
    for wrong in ([], [[3, 0]], [[-1]], [300, 700], [[2.5]]):
        with pytest.raises(ValueError, match="give the tokens of every document"):
            AttentionMask.packed(Band.causal(), wrong)


def test_what_is_no_band_and_no_tensor() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"band": (0, None)}, "band is of type tuple, must be a Band"),
        ({"band": Band(), "q_start": 1.5}, "q_start 1.5 is no position"),
        ({"band": Band(), "q_segments": [0], "k_segments": [0]}, "q_segments are of type list, must be an int32 tensor"),
    ]
    for fields, message in wrong:
        with pytest.raises(ValueError, match=message):
            AttentionMask(**fields)
    for name in ("bias", "alibi_slopes", "dropout_seed", "sinks"):
        with pytest.raises(ValueError, match=f"{name} is of type list, must be a tensor"):
            AttentionSpec(**{name: [0.5]})  # pyright: ignore


def test_half_descriptions_are_refused() -> None:
    ids = torch.zeros(1, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="both queries and keys"):
        AttentionMask(Band.full(), ids)
    for q, k in ((None, None), (ids, ids.clone())):
        with pytest.raises(ValueError, match="boundaries"):
            AttentionMask(Band.full(), q, k, ((0, 4),))


@pytest.mark.parametrize("row", [[0, 1, 0], [-1, 0, 1], [0, -1, 1], [2, 1, -1]])
def test_boundaries_promise_segments_in_order(row: list[int]) -> None:
    ids = torch.tensor([[0, 0, 1], row], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"segments ascend along each row, padding \(-1\) last"):
        AttentionMask(Band.full(), ids, ids, ((0, 2, 3), (0, 3)))
    assert AttentionMask(Band.full(), ids, ids).boundaries is None
    elsewhere = ids.to("meta")  # a device that cannot be asked, as a GPU should not be
    assert AttentionMask(Band.full(), elsewhere, elsewhere, ((0, 2, 3), (0, 3))).boundaries
    padding = torch.tensor([[0, 3, -1], [-1, -1, -1]], dtype=torch.int32)
    assert AttentionMask(Band.full(), padding, padding, ((0, 1, 2), (0,))).boundaries


@pytest.mark.parametrize("number", [-2, -(2**31), 2**31 - 1])
def test_numbers_that_no_document_has(number: int) -> None:
    """Kernels would not agree on what such tokens see."""
    good = torch.tensor([[-1, 0, LAST_DOCUMENT]], dtype=torch.int32)
    wrong = torch.tensor([[0, 0, number]], dtype=torch.int32)
    for q, k, ends in ((wrong, wrong, None), (good, wrong, None), (wrong, good, None), (wrong, wrong, ((0, 2, 3),))):
        with pytest.raises(ValueError, match=rf"a segment of {number}: documents have numbers from 0 to 2147483646, padding is -1"):
            AttentionMask(Band.full(), q, k, ends)
    assert AttentionMask(Band.full(), good, good.clone()).q_segments is good
    elsewhere = wrong.to("meta")
    assert AttentionMask(Band.full(), elsewhere, elsewhere).q_segments is elsewhere
    empty = torch.empty(0, 0, dtype=torch.int32)
    assert AttentionMask(Band.full(), empty, empty).q_segments is empty


def test_a_mask_that_is_made_in_a_compiled_graph() -> None:
    def seen(segments: torch.Tensor) -> torch.Tensor:
        return AttentionMask(Band.causal(), segments, segments, ((0, 2, 3),)).dense(3, 3)

    ids = torch.tensor([[0, 0, 1]], dtype=torch.int32)
    assert torch.equal(torch.compile(seen, fullgraph=True, backend="eager")(ids), seen(ids))
