"""Who may look at whom: a band of relative positions, inside documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from longtrain.attention.layout import Chunk
from longtrain.batch import PADDING, Batch

LAST_DOCUMENT = 2**31 - 2
"""The greatest number of a document: kernels mark with the next one where there is none."""


class Cover(Enum):
    """How much of a rectangle of (query, key) pairs a band lets through."""

    EMPTY = 0
    PARTIAL = 1
    FULL = 2


@dataclass(frozen=True)
class Band:
    """Query i sees key j iff lo <= i - j <= hi; None is unbounded.

    This is the only window convention of the project: causal with window W is (0, W - 1), the window counts the query itself.
    """

    lo: int | None = None
    hi: int | None = None

    @staticmethod
    def full() -> Band:
        return Band()

    @staticmethod
    def causal(window: int | None = None) -> Band:
        """Every key up to the query, or the last `window` of them, the query's own included."""
        if window is not None and window < 1:
            raise ValueError(f"a window of {window} tokens: it counts the query itself, so it is at least 1")
        return Band(0, None if window is None else window - 1)

    @staticmethod
    def causal_bottom_right(queries: int, keys: int) -> Band:
        """Causal with the last query aligned to the last key, for queries that continue a longer key sequence; with ALiBi or
        dropout, give `AttentionMask` their q_start too."""
        return Band(queries - keys, None)

    def between(self, q: Chunk, k: Chunk) -> Band:
        """The same mask in local indices of two chunks of equal stride (docs/attention.md, 'Bands under a ring')."""
        if q.stride != k.stride:
            raise ValueError(f"chunks of strides {q.stride} and {k.stride}")
        stride, d = q.stride, q.start - k.start
        lo = None if self.lo is None else -((d - self.lo) // stride)
        hi = None if self.hi is None else (self.hi - d) // stride
        return Band(lo, hi)

    def shift(self, q_offset: int, k_offset: int) -> Band:
        """The same mask in the indices of a sub-rectangle that starts at (q_offset, k_offset)."""
        d = q_offset - k_offset
        return Band(None if self.lo is None else self.lo - d, None if self.hi is None else self.hi - d)

    def cover(self, queries: int, keys: int) -> Cover:
        """EMPTY, PARTIAL or FULL over a rectangle of `queries` x `keys`."""
        least, most = -(keys - 1), queries - 1
        lo = least if self.lo is None else self.lo
        hi = most if self.hi is None else self.hi
        if queries <= 0 or keys <= 0 or lo > most or hi < least or lo > hi:
            return Cover.EMPTY
        return Cover.FULL if lo <= least and hi >= most else Cover.PARTIAL

    def pairs(self, queries: int, keys: int) -> int:
        """Visible (query, key) pairs of a rectangle of `queries` x `keys`, exactly."""

        def at_least(distance: int) -> int:
            # query i sees min(max(i - distance + 1, 0), keys) keys: a difference of two ramps, each a difference of triangles
            return (
                _triangle(queries - distance)
                - _triangle(-distance)
                - _triangle(queries - distance - keys)
                + _triangle(-distance - keys)
            )

        lo = -keys if self.lo is None else self.lo
        return max(0, at_least(lo) - (0 if self.hi is None else at_least(self.hi + 1)))

    def dense(self, queries: int, keys: int, device: torch.device | None = None) -> Tensor:
        """bool [queries, keys], True where the query sees the key."""
        distance = torch.arange(queries, device=device)[:, None] - torch.arange(keys, device=device)[None, :]
        mask = torch.ones_like(distance, dtype=torch.bool)
        if self.lo is not None:
            mask &= distance >= self.lo
        if self.hi is not None:
            mask &= distance <= self.hi
        return mask


def _triangle(n: int) -> int:
    """1 + 2 + ... + n, 0 below 1."""
    return n * (n + 1) // 2 if n > 0 else 0


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """A band, and the document of every query and key. It always describes the whole sequence; a ring cuts its own part.

    q_segments [B, Tq], k_segments [B, Tk]: int32, documents numbered from 0 to LAST_DOCUMENT in any order, or PADDING (-1); tokens
    see each other only where their segments are equal and not PADDING. Other numbers mean nothing, and are refused where segments
    are on a CPU. Both are None where every token is of one document.

    boundaries: as in `Batch`, on the host, only for self attention; with them a ring skips exchanges that no document needs, and
    kernels know that documents are runs. They promise that segments ascend along a row, padding last, which is checked where
    segments are on a CPU. Without them nothing is skipped.

    q_start: position of the first query where the first key has position 0: ALiBi and dropout go by positions, so queries that
    continue a longer key sequence say where. The band is one of indices, whatever it is. Only on one device.
    """

    band: Band
    q_segments: Tensor | None = None
    k_segments: Tensor | None = None
    boundaries: tuple[tuple[int, ...], ...] | None = None
    q_start: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.band, Band):
            raise ValueError(f"band is of type {type(self.band).__name__}, must be a Band, such as Band.causal()")
        if not torch.compiler.is_compiling() and not isinstance(self.q_start, int):
            raise ValueError(f"q_start {self.q_start!r} is no position, which is a whole number")
        for name, segments in (("q_segments", self.q_segments), ("k_segments", self.k_segments)):
            if segments is not None and not isinstance(segments, Tensor):
                raise ValueError(f"{name} are of type {type(segments).__name__}, must be an int32 tensor [batch, tokens]")
        if (self.q_segments is None) != (self.k_segments is None):
            raise ValueError("give segments for both queries and keys, or for neither")
        if self.boundaries is not None and (self.q_segments is None or self.q_segments is not self.k_segments):
            raise ValueError("boundaries tell where the documents of self attention lie: give them with one tensor of segments")
        both = (self.q_segments,) if self.k_segments is self.q_segments else (self.q_segments, self.k_segments)
        for segments in both:
            if segments is not None and _readable(segments) and segments.numel():
                least, most = (int(x) for x in segments.aminmax())
                if least < PADDING or most > LAST_DOCUMENT:
                    raise ValueError(
                        f"a segment of {least if least < PADDING else most}: documents have numbers from 0 to {LAST_DOCUMENT}, "
                        f"padding is {PADDING}"
                    )
        if self.boundaries is not None and self.q_segments is not None and _readable(self.q_segments):
            documents = self.q_segments.masked_fill(self.q_segments == PADDING, torch.iinfo(self.q_segments.dtype).max)
            if (documents[:, 1:] < documents[:, :-1]).any():
                raise ValueError(
                    "with boundaries, segments ascend along each row, padding (-1) last; give segments alone for others"
                )

    @staticmethod
    def of(batch: Batch, band: Band) -> AttentionMask:
        """The mask of a packed batch. Rows of one unpadded document need no segments at all."""
        length = batch.tokens.shape[1]
        if all(row == (0, length) for row in batch.boundaries):
            return AttentionMask(band)
        return AttentionMask(band, batch.segment_ids, batch.segment_ids, batch.boundaries)

    @staticmethod
    def packed(band: Band, lengths: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> AttentionMask:
        """Self attention inside documents that lie one after another in each row, with these numbers of tokens; a row that is
        shorter than the longest one ends in padding. Raises ValueError where a length is no number of tokens."""
        rows = [row if isinstance(row, Sequence) else [0] for row in lengths]
        if not rows or any(not isinstance(length, int) or length < 1 for row in rows for length in row):
            raise ValueError(f"lengths {lengths}: give the tokens of every document, 1 or more, a list for each row")
        boundaries = tuple(tuple(accumulate(row, initial=0)) for row in lengths)
        segments = torch.full((len(lengths), max(row[-1] for row in boundaries)), PADDING, dtype=torch.int32)
        for row, ends in zip(segments, boundaries, strict=True):
            for number, (start, end) in enumerate(pairwise(ends)):
                row[start:end] = number
        return AttentionMask(band, segments, segments, boundaries).to(device)

    def to(self, device: torch.device | str) -> AttentionMask:
        """The same mask with its segments on `device`."""
        if self.q_segments is None or self.k_segments is None:
            return self
        q_segments = self.q_segments.to(device, non_blocking=True)
        shared = self.k_segments is self.q_segments
        return replace(
            self, q_segments=q_segments, k_segments=q_segments if shared else self.k_segments.to(device, non_blocking=True)
        )

    def dense(self, queries: int, keys: int, device: torch.device | None = None) -> Tensor:
        """bool [1 or B, queries, keys]."""
        return visible(self.band, queries, keys, self.q_segments, self.k_segments, device)


def _readable(segments: Tensor) -> bool:
    """A GPU's answer would have to be waited for, and what is being compiled has none."""
    return segments.device.type == "cpu" and not torch.compiler.is_compiling()


def visible(
    band: Band, queries: int, keys: int, q_segments: Tensor | None, k_segments: Tensor | None, device: torch.device | None
) -> Tensor:
    """bool [1 or B, queries, keys]: band and documents together."""
    mask = band.dense(queries, keys, device)[None]
    if q_segments is not None and k_segments is not None:
        mask = mask & (q_segments[:, :, None] == k_segments[:, None, :]) & (q_segments != PADDING)[:, :, None]
    return mask
