"""Who this rank is: its place in the grid of data and context parallelism, and the process group of its ring."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """dp x cp ranks with cp inner: rank = dp_rank * cp + cp_rank, so that the ranks of one ring are neighbours."""

    dp: int
    cp: int

    def __post_init__(self) -> None:
        if self.dp < 1 or self.cp < 1:
            raise ValueError(f"dp and cp must be at least 1, got dp {self.dp} and cp {self.cp}")

    @property
    def world(self) -> int:
        return self.dp * self.cp

    def place(self, rank: int) -> tuple[int, int]:
        """(dp_rank, cp_rank) of a global rank."""
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} is outside a grid of {self.world}")
        return divmod(rank, self.cp)

    def cp_ranks(self, dp_rank: int) -> list[int]:
        """The global ranks that hold one sequence together, in ring order."""
        return list(range(dp_rank * self.cp, (dp_rank + 1) * self.cp))


@dataclass(frozen=True)
class ParallelContext:
    """This process among all; cp_group, its ring, is None where it would hold one rank. Collectives here run on host memory."""

    rank: int
    world: int
    local_rank: int
    dp: int
    cp: int
    dp_rank: int
    cp_rank: int
    cp_group: dist.ProcessGroup | None
    device: torch.device
    timeout: timedelta = timedelta(minutes=60)

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints, tracks and finishes checkpoints."""
        return self.rank == 0

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Sums of `values` over all ranks, position by position; the same on every rank, whatever the order of ranks.

        Integers give integers; anything else is summed in float64 with one rounding (`math.fsum`).
        """
        whole = all(isinstance(value, int) for value in values)
        rows = self._gather(torch.tensor(list(values), dtype=torch.int64 if whole else torch.float64))
        columns = zip(*(row.tolist() for row in rows), strict=True)
        return [sum(column) if whole else math.fsum(column) for column in columns]

    def all_gather_text(self, text: str) -> list[str]:
        """The text of every rank, in rank order. Bytes, not pickled objects."""
        raw = torch.tensor(list(text.encode()), dtype=torch.uint8)
        sizes = [int(size) for size in self._gather(torch.tensor([raw.numel()], dtype=torch.int64))]
        padded = torch.zeros(max(max(sizes), 1), dtype=torch.uint8)
        padded[: raw.numel()] = raw
        rows = self._gather(padded)
        return [bytes(row[:size].tolist()).decode() for row, size in zip(rows, sizes, strict=True)]

    def _gather(self, row: Tensor) -> list[Tensor]:
        """`row` (host memory, same shape everywhere) of every rank."""
        if self.world == 1:
            return [row]
        rows = [torch.zeros_like(row) for _ in range(self.world)]
        dist.all_gather(rows, row)
        return rows


def create_context(grid: Grid, *, rank: int, local_rank: int, device: torch.device, timeout: timedelta) -> ParallelContext:
    """Build the rings of `grid` over the initialised default group; every rank must call this at the same point."""
    dp_rank, cp_rank = grid.place(rank)
    cp_group: Any = None
    if grid.cp > 1:
        # Every rank creates every group, in one order: new_group is a collective of the whole world.
        cp_group = [dist.new_group(grid.cp_ranks(i), timeout=timeout) for i in range(grid.dp)][dp_rank]
        # NCCL wants every rank in a group's first exchange, and a ring's first hop may be one that only some ranks need.
        dist.all_reduce(torch.zeros(1, device=device), group=cp_group)
    return ParallelContext(
        rank=rank,
        world=grid.world,
        local_rank=local_rank,
        dp=grid.dp,
        cp=grid.cp,
        dp_rank=dp_rank,
        cp_rank=cp_rank,
        cp_group=cp_group,
        device=device,
        timeout=timeout,
    )
