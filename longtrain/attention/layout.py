"""Which positions of a long sequence each rank of a ring holds, as data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """The global positions start, start + stride, ...: `length` of them."""

    start: int
    length: int
    stride: int = 1

    @property
    def last(self) -> int:
        return self.start + self.stride * (self.length - 1)

    def positions(self, device: torch.device | None = None) -> Tensor:
        """int64 [length]."""
        return self.start + self.stride * torch.arange(self.length, device=device)


class SequenceLayout(StrEnum):
    """How a sequence is dealt to the ranks of a ring.

    contiguous: rank r holds one run; a causal ring is unbalanced, a windowed one needs the fewest blocks.
    zigzag: runs r and 2W-1-r of 2W; causal work is balanced (as in ring-flash-attention and Llama 3's context parallelism).
    striped: every W-th position (Striped Attention, Brandon et al. 2023); balanced for any band.
    """

    CONTIGUOUS = "contiguous"
    ZIGZAG = "zigzag"
    STRIPED = "striped"

    def padded_length(self, length: int, ranks: int) -> int:
        """The smallest length >= `length` that this layout splits evenly over `ranks`."""
        unit = ranks if self is not SequenceLayout.ZIGZAG or ranks == 1 else 2 * ranks
        return -(-length // unit) * unit

    def chunks(self, length: int, ranks: int, rank: int) -> tuple[Chunk, ...]:
        """What `rank` holds, in the order of its local tensors; all chunks of a layout have one stride.

        Raises ValueError where `length` is not a padded length.
        """
        if length != self.padded_length(length, ranks):
            raise ValueError(f"{length} positions do not split into a {self} layout of {ranks} ranks")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank {rank} of {ranks}")
        part = length // ranks
        if self is SequenceLayout.STRIPED:
            return (Chunk(rank, part, ranks),)
        if self is SequenceLayout.CONTIGUOUS or rank == ranks - 1:  # zigzag's last rank holds two adjacent runs
            return (Chunk(rank * part if self is SequenceLayout.CONTIGUOUS else rank * part // 2, part),)
        half = part // 2
        return (Chunk(rank * half, half), Chunk((2 * ranks - 1 - rank) * half, half))

    def shard(self, x: Tensor, ranks: int, rank: int, dim: int = 1) -> Tensor:
        """The part of `x` that `rank` holds; a view where one slice suffices. `x` has a padded length along `dim`."""
        parts = [_take(x, chunk, dim) for chunk in self.chunks(x.shape[dim], ranks, rank)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def unshard(self, shards: list[Tensor], length: int | None = None, dim: int = 1) -> Tensor:
        """The inverse of `shard` over all ranks, cut back to `length` positions."""
        ranks = len(shards)
        total = ranks * shards[0].shape[dim]
        shape = list(shards[0].shape)
        shape[dim] = total
        whole = shards[0].new_empty(shape)
        for rank, shard in enumerate(shards):
            chunks = self.chunks(total, ranks, rank)
            for chunk, part in zip(chunks, shard.split([c.length for c in chunks], dim), strict=True):
                _take(whole, chunk, dim).copy_(part)
        return whole if length is None else whole.narrow(dim, 0, length)


def _take(x: Tensor, chunk: Chunk, dim: int) -> Tensor:
    index = [slice(None)] * x.ndim
    index[dim] = slice(chunk.start, chunk.last + 1, chunk.stride)
    return x[tuple(index)]
