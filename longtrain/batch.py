"""The unit of data that travels from the loader to the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

IGNORE = -100
"""Label of a position that bears no loss."""

PADDING = -1
"""Segment id of a position that is not part of any document."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed sequences, whole (never cut by sequence parallelism; `parallel.shard` does that).

    tokens, labels, positions: int64 [B, T]; labels are already shifted, IGNORE bears no loss; positions restart at 0 with every
    document of the row. segment_ids: int32 [B, T], the documents of a row counted from 0, PADDING where there is none.
    boundaries: on the host, per row the start of every document and the end of the last one: documents of 3 and 5 tokens are
    (0, 3, 8). Kernels and the ring schedule read them without waiting for the device. seeds: int64 [B], what dropout of a row is
    drawn from; None in what is not trained on.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    segment_ids: Tensor
    boundaries: tuple[tuple[int, ...], ...]
    seeds: Tensor | None = None
