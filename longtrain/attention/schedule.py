"""Which blocks a rank computes against a visiting shard: pure integers, decided before anything runs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise, permutations, product

from longtrain.attention.layout import Chunk, SequenceLayout
from longtrain.attention.mask import Band, Cover

Boundaries = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """Rows [q0, q1) of my shard against columns [k0, k1) of the visiting one, under a band in indices of that rectangle.

    q_start, k_start, stride: global positions of row q0 and column k0. They hold for the whole rectangle unless it was glued
    from several chunks, which `plan_step` does only where scores do not depend on positions.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    band: Band
    q_start: int
    k_start: int
    stride: int


def plan_step(
    qs: Sequence[Chunk],
    ks: Sequence[Chunk],
    band: Band,
    *,
    boundaries: Boundaries | None = None,
    positional: bool = False,
) -> tuple[BlockPlan, ...]:
    """The blocks of query chunks `qs` against key chunks `ks`; none where nothing is visible.

    boundaries: documents of each row of the batch; a pair of chunks that share no document is left out. positional: scores
    depend on global positions, so chunks are not glued together.
    """
    increasing = all(a.last < b.start for a, b in pairwise(qs))
    if not positional and len(qs) > 1 and tuple(qs) == tuple(ks) and band == Band.causal() and increasing:
        size = sum(c.length for c in qs)  # my own shard: local order is global order
        return (BlockPlan(0, size, 0, size, band, qs[0].start, ks[0].start, qs[0].stride),) if size else ()
    q_offsets = list(accumulate((c.length for c in qs), initial=0))
    k_offsets = list(accumulate((c.length for c in ks), initial=0))
    blocks = []
    for (a, q), (b, k) in product(enumerate(qs), enumerate(ks)):
        local = band.between(q, k)
        cover = local.cover(q.length, k.length)
        if cover is Cover.EMPTY or not _share_documents(q, k, band, boundaries):
            continue
        local = Band.full() if cover is Cover.FULL else local
        ends = (q_offsets[a], q_offsets[a + 1], k_offsets[b], k_offsets[b + 1])
        blocks.append(BlockPlan(*ends, local, q.start, k.start, q.stride))
    return tuple(blocks if positional else _glue(blocks))


def _share_documents(q: Chunk, k: Chunk, band: Band, boundaries: Boundaries | None) -> bool:
    """Whether some document has a visible pair in both chunks. Strided chunks count as runs: too many is safe, too few is not."""
    if boundaries is None:
        return True
    low, high = max(q.start, k.start), min(q.last, k.last)
    for row in boundaries:
        for start, end in pairwise(row[max(bisect_right(row, low) - 1, 0) : bisect_right(row, high) + 1]):
            q0, q1 = max(q.start, start), min(q.last + 1, end)
            k0, k1 = max(k.start, start), min(k.last + 1, end)
            if q1 > q0 and k1 > k0 and band.shift(q0, k0).cover(q1 - q0, k1 - k0) is not Cover.EMPTY:
                return True
    return False


def _glue(blocks: list[BlockPlan]) -> list[BlockPlan]:
    """Joins FULL neighbours that share a whole side, so that zigzag needs no more calls than its hand-written form."""
    for x, y in permutations(blocks, 2):
        if x.band != Band.full() or y.band != Band.full():
            continue
        rest = [b for b in blocks if b is not x and b is not y]
        if (x.q0, x.q1) == (y.q0, y.q1) and x.k1 == y.k0:
            return _glue([*rest, BlockPlan(x.q0, x.q1, x.k0, y.k1, x.band, x.q_start, x.k_start, x.stride)])
        if (x.k0, x.k1) == (y.k0, y.k1) and x.q1 == y.q0:
            return _glue([*rest, BlockPlan(x.q0, y.q1, x.k0, x.k1, x.band, x.q_start, x.k_start, x.stride)])
    return sorted(blocks, key=lambda b: (b.q0, b.k0))


@lru_cache(maxsize=16)  # enough for the layers of one batch; boundaries change with every batch, and tables of many ranks are large
def ring_plan(
    layout: SequenceLayout,
    q_length: int,
    k_length: int,
    ranks: int,
    band: Band,
    boundaries: Boundaries | None = None,
    positional: bool = False,
) -> tuple[tuple[tuple[BlockPlan, ...], ...], ...]:
    """plan[rank][source]: the blocks that `rank` computes against the shard of `source`; empty = that shard is not sent there.

    Every rank holds the same table, so that sender and receiver agree on what to skip without asking. Lengths are padded ones.
    """
    queries = [layout.chunks(q_length, ranks, rank) for rank in range(ranks)]
    keys = [layout.chunks(k_length, ranks, rank) for rank in range(ranks)]
    return tuple(tuple(plan_step(qs, ks, band, boundaries=boundaries, positional=positional) for ks in keys) for qs in queries)
