"""Cutting a packed batch for one rank of a ring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from longtrain.attention.dropout import Noise
from longtrain.attention.mask import AttentionMask, Band
from longtrain.batch import IGNORE, PADDING, Batch


class Dealing(Protocol):
    """How a sequence is dealt to ranks: a `SequenceLayout`, or `parallel.ulysses.UlyssesLayout`."""

    def padded_length(self, length: int, ranks: int) -> int: ...

    def shard(self, x: Tensor, ranks: int, rank: int, dim: int = 1) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Shard:
    """One rank's part: tokens, labels, positions int64 [B, T_local]; the mask still describes the whole sequence. noise: what
    dropout of these positions depends on, None where the batch is not to be trained on."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    mask: AttentionMask
    noise: Noise | None = None

    def to(self, device: torch.device | str) -> Shard:
        """The same shard on `device`."""
        moved = (t.to(device, non_blocking=True) for t in (self.tokens, self.labels, self.positions))
        return Shard(*moved, mask=self.mask.to(device), noise=None if self.noise is None else self.noise.to(device))

    @property
    def trainable(self) -> int:
        """Labels of this shard that bear loss. Reads the tensor: call it while the shard is on the host."""
        return int((self.labels != IGNORE).sum())


def pad_batch(batch: Batch, length: int) -> Batch:
    """The batch with padding up to `length` positions: no document, no loss. Raises ValueError where it is longer than that."""
    more = length - batch.tokens.shape[1]
    if more < 0:
        raise ValueError(f"a batch of {batch.tokens.shape[1]} positions does not fit into {length}")
    if more == 0:
        return batch
    return Batch(
        tokens=pad(batch.tokens, (0, more)),
        labels=pad(batch.labels, (0, more), value=IGNORE),
        positions=pad(batch.positions, (0, more)),
        segment_ids=pad(batch.segment_ids, (0, more), value=PADDING),
        boundaries=batch.boundaries,
        seeds=batch.seeds,
    )


def shard_batch(batch: Batch, layout: Dealing, ranks: int, rank: int, band: Band) -> Shard:
    """What `rank` of a ring of `ranks` trains on. Labels and positions were made for the whole sequence, before it is cut;
    lengths that the layout cannot split are padded."""
    batch = pad_batch(batch, layout.padded_length(batch.tokens.shape[1], ranks))
    tokens, labels, positions = (layout.shard(t, ranks, rank) for t in (batch.tokens, batch.labels, batch.positions))
    places = layout.shard(torch.arange(batch.tokens.shape[1]), ranks, rank, dim=0)
    noise = None if batch.seeds is None else Noise(batch.seeds, places)
    return Shard(tokens, labels, positions, AttentionMask.of(batch, band), noise)
